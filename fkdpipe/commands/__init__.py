"""The verbs of the command line, one file a group; `fkdpipe.cli` puts them together."""
