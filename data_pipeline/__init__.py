"""Bytes in, batches out: image-caption pairs to shards, vocabulary and batches; knows no model."""
