import utils.models.quiet  # noqa: F401
