"""What smalti reaches into DeepSpeed for is there, and a DeepSpeed without it is refused in one line."""

from types import SimpleNamespace

import pytest
from deepspeed.runtime.zero import stage3, stage_1_and_2

from cluster.settings import UserError
from pretrain.engine_shards import BOTH, GRADIENTS, STAGE_1_AND_2, STAGE_3, Shards

SET_IN_INIT = {  # attributes of instances, not of classes
    "averaged_gradients", "fp16_groups", "fp32_partitioned_groups_flat", "offload_optimizer", "grad_position",
    "sub_group_to_group_id", "bit16_groups", "params_in_partition", "single_partition_of_fp32_groups", "cpu_offload",
    "check_grad_overflow", GRADIENTS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (stage3.DeepSpeedZeroOptimizer_Stage3, (*BOTH, *STAGE_3)),
        (stage_1_and_2.DeepSpeedZeroOptimizer, (*BOTH, *STAGE_1_AND_2)),
    ],
)
def test_the_installed_deepspeed_has_the_methods_that_are_replaced_or_called(
    kind: type, names: tuple[str, ...]
) -> None:
    assert [name for name in names if name not in SET_IN_INIT and not hasattr(kind, name)] == []


@pytest.mark.parametrize("missing", ["averaged_gradients", "_optimizer_step", "grad_position"])
def test_another_deepspeed_is_refused_by_what_it_lacks(missing: str) -> None:
    optimizer = SimpleNamespace(**{name: None for name in (*BOTH, *STAGE_3) if name != missing})
    with pytest.raises(UserError, match=rf"{missing}: smalti needs 0\.19\.8 \(pip install deepspeed==0\.19\.8\)"):
        Shards(optimizer, {})
