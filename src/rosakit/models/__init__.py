"""Reference models that use ROSA as their memory."""
