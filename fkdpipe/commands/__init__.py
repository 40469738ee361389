"""The commands, one file per group; `fkdpipe.cli` assembles them."""
