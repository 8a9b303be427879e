"""Uploads that the disk has no room for are refused in a sentence, before a part of them fills what is left of it."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from cli.web.sentences import sentence

_INSUFFICIENT_STORAGE = 507


class RoomForUploads:
    """ASGI middleware around Gradio, which would write until the disk is full, and leave what it has written."""

    def __init__(self, app: Any, folder: Path) -> None:
        self.app, self.folder = app, folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/upload"):
            await self.app(scope, receive, send)
            return
        is_answered = False

        async def answer(message: Any) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        num_bytes = int(dict(scope["headers"]).get(b"content-length", b"0"))
        try:
            if num_bytes > shutil.disk_usage(self.folder).free:
                while (await receive()).get("more_body"):  # who is cut off in the middle sees no answer
                    pass
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            await self.app(scope, receive, answer)
        except OSError as error:
            if is_answered:
                raise
            from starlette.responses import PlainTextResponse

            await PlainTextResponse(sentence(error), _INSUFFICIENT_STORAGE)(scope, receive, send)
