"""Settings and manifests: what users write, and how it is refused."""

from __future__ import annotations

import pytest

from deepfere.config import Config, digest, load_config
from deepfere.errors import DeepfereError, InputError
from deepfere.section import Study, load_study, make_section


def test_defaults_file_overrides_and_flags_in_this_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 4\ntrain:\n  steps: 7\n  batch: 2\nmodel:\n  tier: T1\n")
    config = load_config(file, ["train.steps=9", "ingest.mz=[500.1, 600.2]"], factor=8, train__batch=3, guide=None)
    assert (config.seed, config.factor, config.guide) == (4, 8, True)
    assert (config.train.steps, config.train.batch, config.train.rate) == (9, 3, Config().train.rate)
    assert config.model.tier == "T1"
    assert config.ingest.mz == [500.1, 600.2]
    assert load_config() == Config()
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stpes=3"], r"unknown setting 'train\.stpes'.*known here: .*steps"),
        (["colour=3"], r"unknown setting 'colour'.*known here: .*seed"),
        (["train.steps=0"], r"'train\.steps'.*greater than or equal to 1"),
        (["train.steps=many"], r"'train\.steps'"),
        (["train.steps=3.5"], r"'train\.steps'"),
        (["model.tier=T9"], r"'model\.tier'"),
        (["ingest.tolerance_ppm=-1"], "tolerance_ppm"),
        (["ingest.tolerance_ppm=.nan"], "tolerance_ppm"),
        (["train.rate=.inf"], r"'train\.rate'"),
        (["ingest.mz=[500.0, .nan]"], r"ingest\.mz"),
        (["ingest.mz=[500.0, .inf]"], r"ingest\.mz"),
        (["ingest.mz=[]"], r"ingest\.mz': there is no m/z"),
        (["ingest.mz=[500.0, 0]"], r"ingest\.mz': 0 is not a positive"),
        (["ingest.mz=[-500.0]"], r"ingest\.mz': -500 is not a positive"),
        (["ingest.mz=[many]"], r"ingest\.mz"),
        (["seed=-1"], "'seed'"),
        (["train"], "is not a setting.*key=value"),
        (["=3"], "is not a setting"),
        (["seed.x=3", "seed=[1"], "cannot be read"),
        (["seed=1", "seed.x=3"], "is not a section"),
        (["train=3"], "'train'"),
    ],
)
def test_wrong_settings_are_refused(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_blamed_for_what_was_given_beside_it(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("train: {steps: 5}\n")
    for overrides, given, where in (
        (["train.steps=-1"], {}, "train.steps=-1: setting 'train.steps'"),
        ("train.steps=-1", {}, "train.steps=-1: setting 'train.steps'"),
        (["foo.bar=1"], {}, "foo.bar=1: unknown setting 'foo'"),
        ([], {"ingest__tolerance_ppm": 0.0}, "setting 'ingest.tolerance_ppm'"),
        ([], {"ingest__normalisation": "reference"}, "setting 'ingest'"),
    ):
        with pytest.raises(InputError) as caught:
            load_config(file, overrides, **given)
        assert str(caught.value).startswith(where), caught.value
    file.write_text("train: {steps: -1}\n")
    with pytest.raises(InputError, match=f"^{file}: setting 'train.steps'"):
        load_config(file, ["seed=3"], ingest__tolerance_ppm=5.0)


def test_target_lists_are_sorted_and_each_ion_is_in_them_once():
    config = load_config(None, ["ingest.mz=[600.2, 500.1, 600.2]"])
    assert config.ingest.mz == [500.1, 600.2]
    assert config.digest() == load_config(ingest__mz=[500.1, 600.2]).digest()


def test_a_file_lays_its_values_over_given_settings(tmp_path):
    base = load_config(None, ["train.steps=9", "train.batch=2", "model.tier=T1"])
    (tmp_path / "c.yaml").write_text("train:\n  steps: 7\nseed: 4\n")
    config = load_config(tmp_path / "c.yaml", ["seed=5"], base=base)
    assert (config.train.steps, config.train.batch, config.model.tier, config.seed) == (7, 2, "T1", 5)


def test_unreadable_setting_files_are_refused(tmp_path):
    for name, text, message in (
        ("list.yaml", "- 1\n- 2\n", "key: value"),
        ("bad.yaml", "a: [1\n", "cannot be read"),
        ("unknown.yaml", "a: 1\n", "unknown setting 'a'"),
        ("twice.yaml", "train: {steps: 5}\nseed: 1\ntrain: {batch: 2}\n", "'train' stands twice"),
        ("truth.yaml", "train: {steps: yes}\n", "true is no value"),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            load_config(path)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


def test_digest_follows_the_numbers_only():
    base = Config().digest()
    assert load_config().digest() == base
    for same in ("ray.address=auto", "ray.num_cpus=3", "tracking.uri=none", "train.use_gpu=true", "train.workers=1"):
        assert load_config(None, [same]).digest() == base, same
    changed = [
        load_config(None, [text]).digest()
        for text in (
            "seed=1", "factor=4", "guide=false", "train.steps=81", "train.rate=0.003", "model.tier=T1",
            "train.workers=2", "model.smoothing_pitch=0.2", "ingest.normalisation=tic", "ingest.mz=[500.5]",
            "align.candidates=8",
        )
    ]  # fmt: skip
    assert len({base, *changed}) == len(changed) + 1


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2.5]}) == digest({"b": [1, 2.5], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({})) == 64


def test_resolved_settings_rebuild_the_config():
    config = load_config(None, ["train.steps=9", "ingest.mz=[500.1]"])
    assert Config.model_validate(config.resolved()) == config


def test_yaml_and_csv_manifests_say_the_same(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "sections:\n"
        "- {name: a, msi: data/a.imzML, slide: a.svs, pitch_um: 50}\n"
        "- {name: b-2, msi: 's3://bucket/b.imzML', slide: /abs/b.tiff, pitch_um: [20, 30], slide_mpp_um: 0.25,"
        " landmarks: b.csv}\n"
        "- {name: c, msi: c.imzML}\n"
    )
    (tmp_path / "s.csv").write_bytes(
        b"\xef\xbb\xbfname,msi,slide,pitch_um,slide_mpp_um,landmarks\n"
        b"a,data/a.imzML,a.svs,50,,\n"
        b"b-2,s3://bucket/b.imzML,/abs/b.tiff,20x30,0.25,b.csv\n"
        b'c,c.imzML,,"",,\n'
    )
    study = load_study(tmp_path / "s.yaml")
    assert load_study(tmp_path / "s.csv") == study
    a, b, c = study.sections
    root = tmp_path.resolve()
    assert (a.msi, a.slide) == (str(root / "data/a.imzML"), str(root / "a.svs"))
    assert (b.msi, b.slide) == ("s3://bucket/b.imzML", "/abs/b.tiff")
    assert b.landmarks == str(root / "b.csv")
    assert (a.pitch_um, b.pitch_um, c.pitch_um) == ((50.0, 50.0), (20.0, 30.0), None)
    assert b.slide_mpp_um == (0.25, 0.25)
    assert (c.slide, c.alignment) == (None, None)


GOOD = {"name": "a", "msi": "a.imzML"}


@pytest.mark.parametrize(
    "values",
    [
        {"msi": "a.imzML"},
        {"name": "a"},
        {**GOOD, "name": "../a"},
        {**GOOD, "name": "a b"},
        {**GOOD, "name": ".a"},
        {**GOOD, "pitch_um": 0},
        {**GOOD, "pitch_um": -5.0},
        {**GOOD, "pitch_um": float("nan")},
        {**GOOD, "pitch_um": (10.0, -1.0)},
        {**GOOD, "pitch_um": (10.0, 10.0, 10.0)},
        {**GOOD, "pitch_um": "ten"},
        {**GOOD, "pitch_um": 1e7},
        {**GOOD, "slide_mpp_um": "0.25,zero"},
        {**GOOD, "colour": "red"},
        {**GOOD, "pitch_um": True},
        {**GOOD, "slide_mpp_um": [0.5, True]},
        {**GOOD, "region": True},
        {**GOOD, "name": "a" * 300},
        {**GOOD, "msi": ""},
        {**GOOD, "slide": ""},
        {**GOOD, "slide": "s.tif", "alignment": "a.json", "landmarks": "l.csv"},
    ],
)
def test_wrong_sections_are_refused(values):
    with pytest.raises(InputError) as caught:
        make_section(**values)
    assert isinstance(caught.value, DeepfereError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("50", (50, 50)), ("20,30", (20, 30)), ("20x30", (20, 30)), (7, (7, 7)), ([4], (4, 4)), ((4, 5), (4, 5))],
)
def test_pitches_are_read_as_y_then_x(given, expected):
    assert make_section(**GOOD, pitch_um=given).pitch_um == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.yaml", "sections:\n- {name: a, msi: x}\n- {name: a, msi: y}\n", "must differ; twice: a"),
        ("s.csv", "name,msi\na,x\na,y\n", "must differ; twice: a"),
        ("s.yaml", "sections: []\n", "sections"),
        ("s.yaml", "other: 1\n", 'give a list "sections:"'),
        ("s.yaml", "- 1\n", 'give a list "sections:"'),
        ("s.yaml", "sections: [a]\n", "a section is 'a'"),
        ("s.yaml", "sections: [{name: a}]\n", "msi"),
        ("s.yaml", "sections: [{name: a, msi: x, pitch: 3}]\n", "pitch"),
        ("s.yaml", "a: [\n", "cannot be read"),
        ("s.yaml", "sections: [{name: a, msi: x}]\nsections: [{name: b, msi: y}]\n", "'sections' stands twice"),
        ("s.yaml", "sections:\n- {name: a, msi: x, slide: y, slide: z}\n", "'slide' stands twice, at line 2"),
        ("s.yaml", "sections: [{name: a, msi: ''}]\n", "msi"),
        ("s.csv", "name,msi,alignment,landmarks\na,x,y,z\n", "both an alignment and landmarks"),
        ("s.csv", "name,msi,pitch_um\na,x,0\n", "positive"),
        ("s.csv", "name,file\na,x\n", "a study"),
        ("s.csv", "name,msi,pitch_um\na,x,50\nb,y,50,40\n", r'line 3 \(b\) has more fields.*quote.*"50,40"'),
        ("s.csv", "name,msi,pitch_um,\na,x,50,40\n", r"line 2 \(a\) has more fields.*name every column"),
        ("s.csv", "name,msi\n", "sections"),
        ("s.csv", "name,msi,pitch_um\na,x,1e9\n", "1e.09 x 1e.09 is no size.*below 100 000"),
        (
            "s.csv",
            "nam,msi\na,x\n",
            "has no column name; its first line is 'nam,msi'; give columns, separated by commas",
        ),
        ("s.csv", "name;msi\na;x\n", "has no column name; its first line is 'name;msi'; give columns, separated by"),
        ("s.csv", "name,msi,name\na,x,b\n", "has several columns name"),
        ("s.csv", "name,msi,stain\na,x,y\n", "has the unknown columns stain; give columns.*slide"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    if text.startswith("name,file"):
        message = "msi|file"
    with pytest.raises(InputError, match=message) as caught:
        load_study(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_manifest_and_a_study_of_one(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a study"):
        load_study(tmp_path / "absent.yaml")
    assert len(Study(sections=[make_section(**GOOD)]).sections) == 1


def test_a_quoted_pair_is_one_value_of_a_manifest(tmp_path):
    (tmp_path / "s.csv").write_text('name,msi,pitch_um,slide\na,x,"50,40",\nb,y,50,,\n')
    assert [s.pitch_um for s in load_study(tmp_path / "s.csv").sections] == [(50.0, 40.0), (50.0, 50.0)]
