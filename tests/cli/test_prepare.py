"""`hdb prepare`: a data set that `hdb train` and `hdb preoptimize` read, and what is wrong in a sentence."""

from hypernet.inputs.people import open_people


def test_a_folder_is_prepared_once_and_read_again(hdb, draw_faces):
    folder = draw_faces("a.png", "b.png", "c.png")
    (hdb.folder / folder / "empty.png").touch()
    arguments = ("prepare", folder, "--out", "prepared", "--resolution", 32, "--no-crop", "--num-workers", 0)
    printed = hdb.run(*arguments)
    assert "prepared 4 people in" in printed
    assert "empty.png is empty (0 bytes)" in printed
    assert "left out 1 photos in all" in printed
    assert open_people("prepared").roster == open_people(folder).roster
    assert "prepared 0 people" in hdb.run(*arguments)
    assert "found 1 shards of an earlier run" in hdb.run(*arguments)


def test_what_is_wrong_is_said(hdb, draw_faces):
    folder = draw_faces("a.png")
    quick = ("--resolution", 32, "--no-crop", "--num-workers", 0)
    hdb.run("prepare", folder, "--out", "prepared", *quick)
    assert "was prepared with size_px 32 and not 64" in hdb.fail(
        "prepare", folder, "--out", "prepared", "--resolution", 64, "--no-crop", "--num-workers", 0
    )
    assert "'8/8' is not a part; write 0/8" in hdb.fail("prepare", folder, "--out", "x", "--part", "8/8", code=2)
    assert "is prepared; pass the images" in hdb.fail("prepare", "prepared", "--out", "again", *quick)
