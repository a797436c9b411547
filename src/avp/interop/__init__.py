"""The forms that others speak, read and written."""
