"""The methods, one module a paper; import what you need from them or, lazily, from :mod:`kdrefs`."""
