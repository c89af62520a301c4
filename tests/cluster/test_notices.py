"""What `meshnode status` warns of: what was put, and what is asked for at each reading."""

from meshnode.cluster.service.notices import Notices


def test_what_is_asked_stands_as_long_as_it_is_so() -> None:
    trouble: list[str] = []
    notices = Notices(lambda: trouble[0] if trouble else None)
    notices.put("name", "put")
    assert notices.texts() == ["put"]
    trouble.append("the disk is full")
    assert notices.texts() == ["put", "the disk is full"]
    trouble.clear()
    assert notices.texts() == ["put"]
