import pytest

from seqba import CopyGroup


@pytest.mark.trap(15)
@pytest.mark.parametrize(("world_size", "ranks_per_group", "num_copies"), [(1, 1, 3), (4, 1, 3), (4, 2, 6), (6, 3, 3)])
def test_ranks_share_a_batch_iff_they_are_in_one_group_whose_copies_they_divide(
    world_size, ranks_per_group, num_copies
):
    groups = [CopyGroup(num_copies, rank, world_size, ranks_per_group) for rank in range(world_size)]
    for a in groups:
        for b in groups:
            together = a.rank // ranks_per_group == b.rank // ranks_per_group  # consecutive ranks
            assert (a.index == b.index) == together
            assert (a.shard(1, 5) == b.shard(1, 5)) == together
            assert (a.rank == b.rank or not set(a.copies) & set(b.copies)) or not together
    for index in range(groups[0].num_groups):
        members = [group for group in groups if group.index == index]
        assert [copy for group in members for copy in group.copies] == list(range(num_copies))
        assert [group.counts_samples for group in members] == [True] + [False] * (ranks_per_group - 1)
    assert groups[0].num_groups * ranks_per_group == world_size


@pytest.mark.trap(13)
def test_shards_of_all_groups_and_batches_are_numbered_without_a_gap_and_depend_on_the_group_alone():
    for num_batches in (1, 3):
        alone = CopyGroup(4).num_groups
        assert [CopyGroup(4).shard(batch, num_batches) for batch in range(num_batches)] == list(range(num_batches))
        assert alone == 1
        met = [
            CopyGroup(4, rank, 6, 2).shard(batch, num_batches)
            for rank in range(0, 6, 2)
            for batch in range(num_batches)
        ]
        assert met == list(range(3 * num_batches))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_copies must be a whole number of at least 1, got 0"),
        ((True,), "num_copies must be a whole number of at least 1, got True"),
        ((2, 0, 0), "world_size must be a whole number of at least 1, got 0"),
        ((2, 2, 2), "rank must be from 0 to below world_size 2, got 2"),
        ((2, 0, 3, 2), "the number of ranks must be a multiple of ranks_per_group 2, got 3"),
        ((3, 0, 4, 2), "M, the number of copies, must be a multiple of ranks_per_group 2, got 3"),
    ],
)
def test_numbers_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CopyGroup(*arguments)
