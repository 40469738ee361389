"""fkdpipe: distil image models without a teacher in the loop.

Phase 1 (`fkdpipe.labelgen`) runs teachers once over recorded crops and fills a store;
phase 2 (`fkdpipe.train`) replays exactly those crops. The two meet only on disk, in a store
(`fkdpipe.storage`, `docs/format.md`).
"""

__version__ = "0.1.0"
