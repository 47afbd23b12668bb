"""Tables of model types that have none: inferred from the stock class of transformers.

`tiny_config` shrinks a config, `tiny_model` builds a random model of it, `shapes` finds what every
dimension is a product of, `norms` and `trace` what the modules compute and read, `roles` what they
are called, `table` puts it together, `inferred` proves and keeps it.
"""
