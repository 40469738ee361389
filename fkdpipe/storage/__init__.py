"""The store: what phase 1 leaves and phase 2 reads (`docs/format.md`).

No torch here, so that `report` and `verify` start fast and run anywhere.

Letters in names: N images, M crops recorded per image, U images per unit, g crops per crop group,
C classes, K kept classes, D feature dimensions; B rows of whatever kind.
"""
