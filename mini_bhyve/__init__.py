"""mini-bhyve: FreeBSD's bhyve(8), bhyvectl(8) and the socket between them, in pure Python."""

__version__ = "0.1.0"
