"""Scripted system tools: folders of programs that answer as a given machine's own tools would.

Put in front of PATH, they make a shell (or a real sshd) look like that machine:

    mac = FakeMac("mini-a", number=1, sockets=2)
    folder = make_fake_mac(tmp_path / "mini-a", mac)

`mac_tool.py` is what all programs of a fake Mac run; it keeps its state in `state.json` beside them, so
`sudo ifconfig en2 inet 10.0.0.1 netmask 255.255.255.252` changes what `ifconfig -a` and `netstat` say next.
"""
