"""Ask a server that runs with a token budget, by OpenAI's client, and see what it did to its graphs.

    luvc-fx serve MODEL_DIR --schedule image --port 8000
    python examples/serve_client.py http://localhost:8000 MODEL_DIR photo.png "where is the ring ?"

``luvc_fx/apps/demo_model`` is such a MODEL_DIR, and has ``objects.png`` in it.
"""

import base64
import json
import mimetypes
import sys
import urllib.request
from pathlib import Path

from openai import OpenAI


def messages(image, question):
    """One user's turn, the image as a data URL."""
    kind = mimetypes.guess_type(image)[0]
    url = f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def ask(address, model, image, question, stream, most=32):
    """The answer, in one piece or piece by piece."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=model, messages=messages(image, question), max_tokens=most, temperature=0, stream=stream
    )
    if not stream:
        return answer.choices[0].message.content
    return "".join(piece.choices[0].delta.content or "" for piece in answer if piece.choices)


def report(address):
    """What became of each model's graphs, by the model's name."""
    with urllib.request.urlopen(f"{address}/luvc_fx/report") as answer:
        return json.load(answer)


if __name__ == "__main__":
    address, model, image, question = sys.argv[1:]
    for stream in (False, True):
        print(ask(address, model, image, question, stream))
    for name, found in report(address).items():
        for graph in found["graphs"]:
            print(name, graph["kind"], *graph["inserted"], sep=" | ")
