"""Foreign formats, one file each. Installed as `hra_export.converters`."""

if __name__ != "hra_export.converters":
    raise ImportError(f"import this folder as `hra_export.converters`, not as `{__name__}`")
