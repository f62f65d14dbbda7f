"""ONNX Runtime. The only file that imports it."""


def available_providers() -> tuple[str, ...]:
    """The execution providers that this build of ONNX Runtime was made with, best first.

    One that is listed may still find no device or library when a session is made.

    Raises:
        ImportError: onnxruntime is not installed, or one of its libraries is missing.
    """
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())
