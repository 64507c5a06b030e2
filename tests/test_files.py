"""Files and folders that appear whole or not at all."""

import pytest

from data.files import new_folder


def test_the_folders_above_one_that_was_not_completed_are_removed(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with pytest.raises(OSError, match="full"), new_folder(out):
        raise OSError("full")
    assert not any(tmp_path.iterdir())
    with new_folder(out) as folder:
        folder.rename(out)
    assert out.is_dir()
    (out.parent / "file").touch()
    with pytest.raises(OSError, match="full"), new_folder(out.parent / "other"):
        raise OSError("full")
    assert {path.name for path in out.parent.iterdir()} == {"out", "file"}
