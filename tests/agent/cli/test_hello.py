"""`v2v provider hello`: the terminal shows the very Hello that the page and the broker show."""

import asyncio
import io
import json
from pathlib import Path

import aiohttp
import pytest
import segno
from plug import PORT, Plug
from town import v2v

from agent.core.messages import encode
from agent.runners.http import HttpRunner

ROOT = Path(__file__).parents[3]


@pytest.fixture
async def served(tmp_path):
    """(plug, url): a provider and its web server."""
    plug = Plug(tmp_path)
    plug.header()
    http = HttpRunner(plug.engine, plug.door, "127.0.0.1", 0)
    task = asyncio.create_task(http.run())
    await http.listening.wait()
    yield plug, http.url
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    plug.close()


def settings(folder, listen):
    """The shipped settings, at this address, whose port is the story's."""
    text = (ROOT / "config/agent.toml").read_text()
    lines = [
        f'[http]\nlisten = "{listen}"' if line.startswith("[http]") else line for line in text.splitlines()
    ]
    file = folder / "agent.toml"
    file.write_text("\n".join(lines))
    return str(file)


async def test_terminal_page_and_door_show_the_same_hello(served, tmp_path):
    """Would catch a code on the screen that is another one than the terminal's, or than the door takes."""
    plug, url = served
    file = settings(tmp_path, url.removeprefix("http://"))
    data = encode(plug.door.hello(PORT))
    said = await asyncio.to_thread(v2v, "provider", "hello", "--config", file, "--json")
    assert json.loads(said.out)["hellos"] == {PORT: json.loads(data)}
    said = await asyncio.to_thread(v2v, "provider", "hello", "--config", file, "--port", PORT)
    code = segno.make(data.decode(), error="l", micro=False, boost_error=False)
    drawn = io.StringIO()
    code.terminal(out=drawn, compact=True)
    assert said.exit_code == 0
    assert drawn.getvalue().strip() in said.out
    async with aiohttp.ClientSession() as phone, phone.get(f"{url}/") as page:
        text = await page.text()
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert code.svg_inline(scale=5) in text
    assert data.decode() not in text, "a code to scan, not a nonce to read"


async def test_a_page_shows_the_next_hello_when_one_was_used(served):
    """Would catch a picture that is kept for too long: nobody could charge with it."""
    plug, url = served
    async with aiohttp.ClientSession() as phone:
        async with phone.get(f"{url}/") as page:
            before = await page.text()
        async with phone.get(f"{url}/") as page:
            assert await page.text() == before
        plug.door._hellos[PORT][-1].used = True
        async with phone.get(f"{url}/") as page:
            assert await page.text() != before


def test_what_went_wrong_is_said_with_a_remedy(tmp_path):
    """Would catch a traceback where an owner needs to know that the agent does not run."""
    nobody = v2v("provider", "hello", "--config", settings(tmp_path, "127.0.0.1:1"))
    assert nobody.exit_code == 69
    assert "Is it running?" in nobody.err
    anywhere = v2v("provider", "hello", "--config", settings(tmp_path, "127.0.0.1:0"))
    assert anywhere.exit_code == 3
    assert "[http] enabled" in anywhere.err


async def test_no_hello_yet_and_no_such_port(served, tmp_path):
    """Would catch an empty screen without a word."""
    _, url = served
    file = settings(tmp_path, url.removeprefix("http://"))
    said = await asyncio.to_thread(v2v, "provider", "hello", "--config", file, "--port", "elsewhere")
    assert said.exit_code == 3
    assert f"Ports: {PORT}" in said.err
