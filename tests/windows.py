"""Every module of the repository, and a small run, under rules of Windows that Linux can imitate:
python tests/windows.py FOLDER

The modules and names that Windows lacks are missing. No folder can be opened as a file. A file that
this process has open, or mapped, is neither removed nor renamed nor replaced. Other people's
packages are imported before, as on Linux.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OTHERS = "numpy sentencepiece tiktoken torch tqdm".split()
NO_MODULES = "fcntl grp pty pwd resource termios".split()
NO_MODULES += ["matplotlib"]  # which Windows has, but it takes as long as all the rest
NOT_IN_OS = "O_DIRECTORY O_NOFOLLOW O_NONBLOCK fork getuid sysconf uname".split()
SMALL = (
    "n_layer=1 n_head=2 n_embd=16 n_hidden=16 block_size=8 batch_size=4 warmup_iters=1 "
    "eval_iters=2 eval_interval=1 save_interval=1 sample_tokens=4 device=cpu resume=auto"
).split()


def become_windows():
    for name in OTHERS:
        importlib.import_module(name)
    sys.platform, os.sep = "win32", "\\"
    sys.modules.update(dict.fromkeys(NO_MODULES))  # None: to import them is an ImportError
    for name in NOT_IN_OS:
        delattr(os, name)
    del signal.SIGHUP
    shutil._use_fd_functions = False  # rmtree opens folders on Linux
    sys.addaudithook(refuse)


def refuse(event, arguments):
    """Raises PermissionError where Windows does. Python calls it before what it is about to do."""
    paths = [os.path.abspath(a) for a in arguments if isinstance(a, (str, os.PathLike))]
    if event == "open" and paths and os.path.isdir(paths[0]):
        raise PermissionError(13, "a folder is no file", paths[0])
    if event in ("os.rename", "os.remove", "os.rmdir"):
        for path in paths:
            if any(name == path or name.startswith(f"{path}/") for name in held_files()):
                raise PermissionError(13, "this process has it open", path)


def held_files():
    """The files that this process has open or mapped."""
    for number in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{number}"):  # else it was open for the listing alone
            yield os.readlink(f"/proc/self/fd/{number}")
    with open("/proc/self/maps") as file:
        yield from [line.split(maxsplit=5)[5].strip() for line in file if "/" in line]


def import_all():
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split():
        if not name.startswith(("tests/", "docs/")):  # of the program itself
            name = name.removesuffix(".py").removesuffix("/__init__")
            importlib.import_module(name.replace("/", "."))


def main(folder):
    become_windows()
    from config.command import start

    start()
    os.environ["ROOTLLAMA_DATA"] = str(folder)
    import_all()
    import sample
    import train

    run, text = folder / "run", folder / "text.txt"
    text.write_bytes("a cat sat on a mat \u4e2d\r\n".encode() * 2000)
    for steps in (2, 4):
        words = [*SMALL, f"out_dir={run}", f"dataset={text}", f"max_iters={steps}"]
        assert train.main([str(ROOT / "config" / "tiny.py"), *words]) == 0
    assert sample.main([str(run), "prompt=\u4e2d cat", "max_new_tokens=5", "device=cpu"]) == 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]))
