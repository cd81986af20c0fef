"""`python -m rosakit.demo`: what a short window loses and what retrieval restores, in minutes."""
