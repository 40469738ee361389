"""Phase 2: students trained on recorded crops and stored labels."""
