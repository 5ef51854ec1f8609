"""What locust's users do in `serving.py`: post the same binary request again and again."""

import os
from pathlib import Path

from locust import FastHttpUser, task

BODY = Path(os.environ["REQUEST_BODY"]).read_bytes()
HEADERS = {
    "Content-Type": "application/octet-stream",
    "Inference-Header-Content-Length": os.environ["REQUEST_HEADER_LENGTH"],
}
PATH = f"/v2/models/{os.environ['REQUEST_MODEL']}/infer"


class Client(FastHttpUser):
    """Waits for each answer, then sends the next request at once."""

    @task
    def infer(self) -> None:
        """Send one request."""
        self.client.post(PATH, data=BODY, headers=HEADERS)
