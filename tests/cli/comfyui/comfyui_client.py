"""Queue a workflow in a running ComfyUI and print what its websocket tells, as JSON. Runs in ComfyUI's Python.

python comfyui_client.py ADDRESS WORKFLOW.json [STEP]    # a Cancel after that step
"""

import asyncio
import json
import sys
import uuid
from pathlib import Path

import aiohttp

_ENDS = ("execution_success", "execution_error", "execution_interrupted")


async def follow(address: str, prompt: dict, cancel_at: int | None) -> dict:
    """Progress as (node, step, steps), the number of pictures, and how it ended: the last message's type and data."""
    client, progress, pictures = uuid.uuid4().hex, [], 0
    async with aiohttp.ClientSession(address) as session, session.ws_connect(f"/ws?clientId={client}") as messages:
        async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            queued = await answer.json()
        if "prompt_id" not in queued:
            return {"ended": "refused", "data": queued, "progress": [], "pictures": 0}
        async for message in messages:
            if message.type is not aiohttp.WSMsgType.TEXT:
                pictures += message.type is aiohttp.WSMsgType.BINARY
                continue
            kind, data = (event := json.loads(message.data))["type"], event["data"]
            if kind == "progress":
                progress.append((data["node"], data["value"], data["max"]))
                if data["value"] == cancel_at:
                    await session.post("/interrupt")
            if kind in _ENDS:
                return {"ended": kind, "data": data, "progress": progress, "pictures": pictures}
    raise ConnectionError("ComfyUI closed the connection")


if __name__ == "__main__":
    at = int(sys.argv[3]) if len(sys.argv) > 3 else None
    print(json.dumps(asyncio.run(follow(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), at))))
