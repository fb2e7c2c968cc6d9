"""What is wrong with a template, or with what it does."""


class TemplateError(ValueError):
    """A template cannot be read, or fails when it is executed; the message says where and why."""
