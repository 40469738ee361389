"""Phase 1: teachers run once over recorded crops and fill a store."""
