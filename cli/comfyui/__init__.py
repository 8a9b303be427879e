"""ComfyUI's nodes for lidb-peft: this folder is a custom node, which `hdb comfyui install` puts into ComfyUI.

ComfyUI loads it from its own folder; importing it as a part of ``cli`` brings nothing of ComfyUI in.
"""


async def comfy_entrypoint():
    """What ComfyUI asks for its nodes."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class LidbPeft(ComfyExtension):
        async def get_node_list(self):
            return list(NODES)

    return LidbPeft()
