"""Tools that measure, export and explain models; each is also a sub-command of `visionattn`."""

if __name__ != "visionattn.tools":
    raise ImportError("import visionattn.tools, not tools: the folder is a room of the package visionattn")
