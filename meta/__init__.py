"""Meta-training, imported as `celo2.meta`; this version has none: theta comes from a file or a closed form."""
