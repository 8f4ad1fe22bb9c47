"""The formula that predicts a merge's time, against numbers worked out by hand; and the sizes that it is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from metagpt_fast.benchmarking.prediction import fits_in_cache, predict
from metagpt_fast.benchmarking.rates import BusRates, Rates, sharing_of
from metagpt_fast.benchmarking.run import DISK_SECONDS, MIN_NBYTES, files_nbytes, forecasts_of
from metagpt_fast.benchmarking.work import MODELS, Work, shape_of_size, work_of
from metagpt_fast.dtypes import BF16
from metagpt_fast.family import family_nbytes

G = 10**9
RATES = Rates(
    memory_read=100 * G,
    memory_triad=100 * G,
    layer_gram=100 * G,
    layer_merge=100 * G,
    disk_read=10 * G,
    cache_read=50 * G,
    cache_write=25 * G,
    disk_write=5 * G,
    sharing=0.0,
    start_seconds=1.0,
)
WHOLE = Work((40 * G,), num_models=3)  # 10 G are written
LARGE, SMALL = 1000 * G, 20 * G


def parts(prediction):
    return {name: pytest.approx(seconds) for name, seconds in prediction.parts.items() if seconds}


def test_two_passes_the_second_from_the_page_cache():
    # read 40/10 = 4; then from the cache 40/50 + 10/25 = 1.2, while 10/5 = 2 are written
    prediction = predict(WHOLE, RATES, LARGE)
    assert prediction.seconds == pytest.approx(1 + 4 + 2)
    assert parts(prediction) == {"start": 1, "disk read": 4, "memory": 1.2, "disk write": 0.8}
    assert prediction.bottleneck == "disk read"
    assert prediction.nbytes_again == prediction.nbytes_again_cached == 40 * G


def test_two_passes_the_second_partly_from_the_disk():
    # The cache of 20 holds the last 16 that were read, and the 4 that are written for them: 24 are read again.
    prediction = predict(WHOLE, replace(RATES, sharing=0.5), SMALL)
    assert prediction.nbytes_again_cached == pytest.approx(16 * G)
    # 24/10 = 2.4 of reading, and half of 10/5 = 2 of writing
    assert prediction.seconds == pytest.approx(1 + 4 + 2.4 + 1.0)
    assert parts(prediction) == {"start": 1, "disk read": 6.4, "disk write": 1.0}


def test_from_the_page_cache_alone():
    prediction = predict(WHOLE, RATES, LARGE, is_warm=True)
    assert prediction.seconds == pytest.approx(1 + 0.8 + 2)
    assert parts(prediction) == {"start": 1, "memory": 2.0, "disk write": 0.8}
    fast = predict(WHOLE, replace(RATES, disk_write=1000 * G), LARGE, is_warm=True)
    assert fast.seconds == pytest.approx(1 + 0.8 + 1.2)
    assert fast.bottleneck == "memory"


@pytest.mark.parametrize(("sharing", "seconds"), [(0.0, 1 + 2 + 3.2), (1.0, 1 + 2 + 4)])
def test_layers_are_written_while_the_next_ones_are_read(sharing, seconds):
    # Each of 20: read 2, combine 20/50 + 5/25 = 0.6. Behind the first 2: phases of 3.2; 20/10 read beside 10/5 written.
    prediction = predict(Work((20 * G, 20 * G), 3), replace(RATES, sharing=sharing), LARGE)
    assert prediction.seconds == pytest.approx(seconds)


def test_small_scopes_are_still_mapped_when_they_are_combined():
    # Each: read 0.02, which hides 0.2/50 + 0.2/100 + 0.05/25 = 0.008
    work = Work((G // 5, G // 5), 3)
    prediction = predict(work, RATES, LARGE)
    assert prediction.seconds == pytest.approx(1 + 2 * 0.02)
    assert prediction.nbytes_again == 0
    fast = replace(RATES, disk_write=1000 * G)
    assert predict(work, fast, LARGE, is_warm=True).seconds == pytest.approx(1 + 2 * 0.008)


def test_slow_kernels():
    # measure: 40/50 + (40/20 − 40/100) = 2.4, 2 of them in the kernel
    # combine: 40/50 + (50/25 − 50/100) + 10/25 = 2.7, 2 of them in the kernel
    slow = replace(RATES, layer_gram=20 * G, layer_merge=25 * G)
    prediction = predict(WHOLE, slow, LARGE, is_warm=True)
    assert prediction.seconds == pytest.approx(1 + 2.4 + 2.7)
    assert parts(prediction) == {"start": 1, "kernels": 4.0, "memory": 1.1}
    assert prediction.bottleneck == "kernels"
    # Faster than memory, as a merge may be, is not counted.
    fast = replace(RATES, layer_gram=300 * G, layer_merge=300 * G)
    assert predict(WHOLE, fast, LARGE) == predict(WHOLE, RATES, LARGE)


def test_a_gpu_is_bound_by_its_bus():
    # measure: 40/8 = 5, more than 40/50 + 40/100; combine: 40/8, more than 10/16 and than 40/50 + 40/100 + 10/25
    rates = replace(RATES, bus=BusRates("cuda:0 (Some GPU)", 8 * G, 16 * G))
    prediction = predict(WHOLE, rates, LARGE, is_warm=True, on_gpu=True)
    assert prediction.seconds == pytest.approx(1 + 5 + 5)
    assert parts(prediction) == {"start": 1, "bus": 10}
    cold = predict(WHOLE, rates, LARGE, on_gpu=True)
    assert cold.seconds == pytest.approx(1 + 5 + 5)  # the disk is faster than this bus
    wide = replace(rates, bus=BusRates("x", 1000 * G, 1000 * G))
    prediction = predict(WHOLE, wide, LARGE, is_warm=True, on_gpu=True)
    assert prediction.seconds == pytest.approx(1 + 1.2 + 2)
    with pytest.raises(ValueError, match="bus"):
        predict(WHOLE, RATES, LARGE, on_gpu=True)


def test_parts_add_up():
    for cache in (SMALL, LARGE):
        for work in (WHOLE, Work((3 * G, G // 10, 7 * G), 2)):
            prediction = predict(work, replace(RATES, sharing=0.3, layer_gram=30 * G), cache)
            assert sum(prediction.parts.values()) == pytest.approx(prediction.seconds)


def test_inputs_and_output_have_to_fit_the_page_cache():
    assert fits_in_cache(WHOLE, 50 * G)
    assert not fits_in_cache(WHOLE, 50 * G - 1)


@pytest.mark.parametrize(("both", "sharing"), [(3.0, 0.0), (4.0, 0.5), (5.0, 1.0), (2.5, 0.0), (9.0, 1.0)])
def test_sharing(both, sharing):
    assert sharing_of(3.0, 2.0, both) == sharing_of(2.0, 3.0, both) == sharing


def test_sizes_of_real_models():
    """As their model cards have them: Llama 2 7B, Llama 3.1 70B and 405B."""
    numels = {name: family_nbytes(shape, 0) // 2 for name, shape in MODELS.items()}
    assert numels == {"7 B": 6_738_415_616, "70 B": 70_553_706_496, "405 B": 405_853_388_800}
    assert work_of(MODELS["7 B"], "model").scopes == (8 * 6_738_415_616,)
    layers = work_of(MODELS["7 B"], "layer")
    assert layers.nbytes_in == 8 * 6_738_415_616
    # 32 layers; embedding, norm and head outside of them
    assert sorted(layers.scopes)[:3] == [8 * 4096, 8 * 32000 * 4096, 8 * 32000 * 4096]
    assert sorted(layers.scopes)[3:] == [8 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)] * 32


@pytest.mark.parametrize("nbytes", [1 << 20, 10 << 20, 100 * 10**6, 500 * 10**6, 4 * 10**9])
def test_shape_of_a_size(nbytes):
    assert 0.8 * nbytes < family_nbytes(shape_of_size(nbytes), 0, BF16) <= nbytes


def test_files_are_smaller_for_slow_disks_and_small_memories():
    assert files_nbytes(2 * G, 1.0 * G, 100 * G) == 2 * G
    assert files_nbytes(2 * G, 20e6, 100 * G) == int(20e6 * DISK_SECONDS / 7.5)
    assert files_nbytes(2 * G, 1.0 * G, G) == int(G / 2 / 1.3)
    assert files_nbytes(2 * G, 1.0, 100 * G) == MIN_NBYTES


def test_forecasts():
    forecasts = forecasts_of(RATES, 60 * G)
    keys = [(each.model, each.device, each.granularity) for each in forecasts]
    assert keys == [(model, "cpu", how) for model in MODELS for how in ("model", "layer")]
    # 54 GB of inputs and 13 of output do not fit 60
    assert all(each.warm is None for each in forecasts)
    assert all(each.warm is not None for each in forecasts_of(RATES, 70 * G)[:2])
    with_gpu = forecasts_of(replace(RATES, bus=BusRates("cuda:0 (X)", G, G)), 60 * G)
    assert [each.device for each in with_gpu[:4]] == ["cpu", "cpu", "cuda:0 (X)", "cuda:0 (X)"]
    assert with_gpu[2].cold.bottleneck == "bus"
