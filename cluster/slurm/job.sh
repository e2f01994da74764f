#!/bin/bash
@directives@

# Told to stop, this script tells the program, which saves and ends with 75, and then queues itself again.
# USR1 comes before the time limit (--signal above); TERM is scancel, scontrol requeue or preemption: whoever sent
# that decides what becomes of the job. The program hears of both as USR1, which srun passes on to every rank; at
# TERM srun would kill them all.
told=
step=
stop() {
    told=$1
    [ -z "$step" ] || kill -s USR1 "$step" 2>/dev/null
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

# The address as SLURM has it: names of nodes need not be known to the resolver.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$first}"
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
echo "$(date '+%F %T') job $job starts on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
@setup@

if [ -n "$told" ]; then
    code=75
else
    @command@ &
    step=$!
    while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done # a signal ends a wait early
    wait "$step"
    code=$?
fi

# 138: USR1 met a program that does not listen to it, or not yet. What it had finished is kept.
if [ "$told" = USR1 ] && [ "$code" -eq 138 ]; then code=75; fi
echo "$(date '+%F %T') job $job ends with code $code"
if [ "$code" -eq 75 ] && [ "$told" != TERM ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt @restarts@ ]; then
        echo "job $job queues itself again"
        scontrol requeue "$job"
    else
        echo "job $job was restarted ${SLURM_RESTART_COUNT:-0} times, as often as it may be (restarts=@restarts@)"
    fi
fi
exit "$code"
