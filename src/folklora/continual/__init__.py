"""What keeps the old tasks alive while a stream of tasks goes by; one file a method."""
__all__: list[str] = []
