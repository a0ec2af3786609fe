import utils.models.quiet  # noqa: F401  (before PEFT is imported)
