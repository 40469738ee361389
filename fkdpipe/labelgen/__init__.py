"""Phase 1: run teachers once over recorded crops and fill a store."""
