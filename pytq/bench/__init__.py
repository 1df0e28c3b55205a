"""Speed of cache types against an unpatched build: ``shapes``, ``runner``, ``stats``, ``report``."""
