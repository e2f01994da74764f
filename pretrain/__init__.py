"""The transformer, its sampler and ranker, and the command line."""
