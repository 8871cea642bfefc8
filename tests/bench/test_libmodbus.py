"""libmodbus through ctypes: the slave that the bench and the end-to-end stories compare with must say what it promises."""

import pytest
from stage import free_port

from bench import _libmodbus as libmodbus


@pytest.mark.skipif(
    libmodbus.library() is None, reason="libmodbus is not installed: apt-get install libmodbus5"
)
def test_two_masters_share_one_slave() -> None:
    """Would catch a slave that serves one contestant at a time, so that a bench would measure its queue."""
    port = str(free_port())
    with libmodbus.slave("tcp", port):
        masters = [libmodbus.Master("tcp", port) for _ in range(2)]
        assert [master.read(10, 2) for master in masters] == [[1010, 1011]] * 2
        with pytest.raises(OSError, match="Illegal data address"):
            masters[0].read(libmodbus.REGISTERS, 1)
        for master in masters:
            master.close()
