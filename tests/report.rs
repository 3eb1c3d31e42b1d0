//! The looks: escaping, self-containedness, well-formed drawings, tables, pictures, traces.

#[allow(dead_code)]
#[path = "common/trace.rs"]
mod rules;

use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::time::Duration;
use swat::modules::{Cell, ModuleKind, ModuleSet};
use swat::report::chart::{Bar, BarChart, BarPanel, BarSeries, Direction, LineChart, LinePanel, LineSeries, Point};
use swat::report::swat::{
    CellScore, Drift, EpochDrift, Measure, Mods, Results, Robustness, SetOutcome, Setting, SettingDrift, SettingKind,
    SettingLoss, SettingResult, SettingUpdates, SwatReport, Updates, mods_map, results_table, robustness_map,
};
use swat::report::table::{Entry, Table, TextStyle};
use swat::report::trace::{TraceWriter, Track};
use swat::report::{Footer, Heatmap, Ramp, Scale, Tone};

const HOSTILE: [&str; 5] = [
    "</script><img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "a & b < c > d ]]> <!-- \u{0}\u{1b}[31m \u{202e}",
    "</title></style></svg>",
    "`<b>` ` <i>",
];

/// Checks that a text is well-formed XML of the kind that drawings use; returns the names of its elements.
fn check_xml(text: &str) -> Result<Vec<String>, String> {
    let mut open: Vec<String> = Vec::new();
    let mut names = Vec::new();
    let check_text = |text: &str| -> Result<(), String> {
        if let Some(c) = text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t')) {
            return Err(format!("control character {c:?}"));
        }
        for part in text.split('&').skip(1) {
            let entity = part.split_once(';').map(|(name, _)| name);
            if !matches!(entity, Some("amp" | "lt" | "gt" | "quot" | "#39")) {
                return Err(format!("a bare & before {part:.20?}"));
            }
        }
        Ok(())
    };
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('<') {
        check_text(before)?;
        let (tag, after) = after.split_once('>').ok_or("a tag without end")?;
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            let opened = open.pop();
            if opened.as_deref() != Some(name) {
                return Err(format!("</{name}> closes {opened:?}"));
            }
            continue;
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |t| (t, true));
        let (name, mut attributes) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(format!("a tag named {name:?}"));
        }
        let mut seen = HashSet::new();
        while !attributes.trim().is_empty() {
            let (key, value) = attributes.trim_start().split_once("=\"").ok_or(format!("attributes {attributes:?}"))?;
            let (value, next) = value.split_once('"').ok_or("an attribute without end")?;
            if !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') || !seen.insert(key) {
                return Err(format!("attribute {key:?} of {name}"));
            }
            check_text(value)?;
            if ["NaN", "inf"].iter().any(|bad| value.contains(bad)) {
                return Err(format!("{key}={value:?}"));
            }
            attributes = next;
        }
        names.push(name.to_owned());
        if !closed {
            open.push(name.to_owned());
        }
    }
    check_text(rest)?;
    if open.is_empty() && rest.trim().is_empty() { Ok(names) } else { Err(format!("left open: {open:?}")) }
}

/// Deterministic noise from 0 to 1.
fn noise(seed: u64) -> f64 {
    let mut x = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

fn measure(value: f64, half: f64) -> Option<Measure> {
    let most = if value <= 1.0 { 1.0 } else { f64::INFINITY };
    Some(Measure { value, interval: Some(((value - half).max(0.0), (value + half).min(most))) })
}

fn setting(kind: SettingKind, name: &str) -> Setting {
    Setting { kind, name: name.into() }
}

/// A run of a model of 30 layers, made up.
fn example() -> SwatReport {
    const LAYERS: usize = 30;
    let mut cells = vec![CellScore { cell: Cell::Embedding, mean: 0.412, std_error: 0.021 }];
    let mut chosen = ModuleSet::default();
    let mut all = ModuleSet::default();
    let mut agreement = Vec::new();
    for layer in 0..LAYERS {
        for (at, kind) in ModuleKind::ALL.into_iter().enumerate() {
            let early = (-(layer as f64) / 6.0).exp();
            let by_kind = [0.30, 0.26, 0.12, 0.10, 0.14, 0.13, 0.24][at];
            let mean = by_kind * (0.15 + early) + 0.03 * noise((layer * 7 + at) as u64) - 0.012
                + if layer == 0 { 0.35 * by_kind * 4.0 } else { 0.0 };
            let cell = Cell::module(layer, kind);
            cells.push(CellScore { cell, mean, std_error: 0.004 + 0.01 * noise(layer as u64 + 900) });
            all.insert(cell);
            if mean < 0.045 && layer > 7 {
                chosen.insert(cell);
            }
            let votes = if mean < 0.03 {
                1.0
            } else if mean < 0.045 {
                0.75
            } else if mean < 0.06 {
                0.25
            } else {
                0.0
            };
            agreement.push((cell, votes));
        }
    }
    let row = |kind, name: &str, values: [f64; 5], steps, share: Option<f64>, seeds: &[u64]| SettingResult {
        setting: setting(kind, name),
        asr: measure(values[0], 0.06),
        strict_asr: measure(values[1], 0.05),
        over_refusal: measure(values[2], 0.02),
        task: measure(values[3], 0.013),
        perplexity: measure(values[4], 0.21),
        steps,
        trainable_share: share,
        seeds: seeds.to_vec(),
    };
    use SettingKind::*;
    let five = [1, 2, 3, 4, 5];
    let mut as_given = row(AsGiven, "as given", [0.021, 0.0, 0.033, 0.212, 9.81], 0, None, &[]);
    as_given.strict_asr = None;
    let results = Results {
        rows: vec![
            as_given,
            row(Plain, "plain", [0.912, 0.551, 0.004, 0.961, 3.12], 400, None, &five),
            row(PlainEqualSteps, "plain at equal steps", [0.954, 0.602, 0.0, 0.968, 3.05], 1200, None, &five),
            row(Swat, "SWAT", [0.538, 0.183, 0.011, 0.963, 3.10], 1200, Some(0.402), &five),
            row(Random, "random sets", [0.861, 0.447, 0.006, 0.962, 3.11], 1200, Some(0.398), &five),
            row(Complement, "complement", [0.973, 0.688, 0.0, 0.957, 3.16], 1200, Some(0.598), &five),
            row(Refusals, "10 % refusals", [0.012, 0.004, 0.061, 0.959, 3.15], 400, None, &five),
        ],
        intervals:
            "Values are means over the seeds; in brackets 95 % Wilson intervals over 230 forbidden, 230 harmless \
                    and 360 task prompts. `Strict` counts answers that do what was forbidden, word for word."
                .into(),
    };
    let relative = |inside: f64, outside: f64, salt: u64| -> Vec<(Cell, f64)> {
        let value = |cell: Cell| {
            let layer = cell.layer().unwrap_or(0) as f64;
            let side = if chosen.contains(cell) { inside } else { outside };
            side * (0.7 + 0.3 * (layer / 5.0).sin().abs() + 0.3 * noise(salt + cell.layer().unwrap_or(0) as u64))
        };
        all.iter().map(|cell| (cell, value(cell))).collect()
    };
    let updates = Updates {
        settings: vec![
            SettingUpdates {
                setting: setting(Plain, "plain"),
                relative: relative(0.021, 0.024, 7),
                seeds: five.into(),
            },
            SettingUpdates { setting: setting(Swat, "SWAT"), relative: relative(0.031, 0.011, 99), seeds: five.into() },
        ],
        mods: chosen.clone(),
    };
    let drift = |kind, name: &str, fall: f64| SettingDrift {
        setting: setting(kind, name),
        epochs: (0..=8)
            .map(|e| {
                let e = f64::from(e);
                let with =
                    |value: f64, half: f64| Some(Measure { value, interval: Some((value - half, value + half)) });
                EpochDrift {
                    epoch: e,
                    probe: with(8.4 - 0.12 * e * fall + 0.3 * noise(e as u64 + 40), 0.25),
                    refusal: with(11.5 * (-fall * e / 3.0).exp() - 2.0 * fall * (e / 8.0), 0.7),
                }
            })
            .collect(),
    };
    let loss = |kind, name: &str, rate: f64, salt: u64| SettingLoss {
        setting: setting(kind, name),
        seeds: vec![1],
        points: (0..1200)
            .map(|s| (s, 0.35 + 2.4 * (-(s as f64) * rate).exp() + 0.18 * (noise(s + salt) - 0.5)))
            .collect(),
    };
    let mut sets = vec![SetOutcome {
        setting: setting(Swat, "Mods_Rob"),
        joint_score: 0.048,
        asr: Measure { value: 0.538, interval: Some((0.47, 0.60)) },
        seeds: five.into(),
    }];
    for i in 0..7 {
        let joint_score = 0.2 + 0.5 * noise(i + 3);
        let value = (0.5 + joint_score * 0.6 + 0.2 * (noise(i + 60) - 0.5)).min(1.0);
        sets.push(SetOutcome {
            setting: setting(Random, &format!("random {}", i + 1)),
            joint_score,
            asr: Measure { value, interval: Some(((value - 0.06).max(0.0), (value + 0.06).min(1.0))) },
            seeds: five.into(),
        });
    }
    sets.push(SetOutcome {
        setting: setting(Complement, "complement"),
        joint_score: 0.91,
        asr: Measure { value: 0.973, interval: Some((0.94, 0.99)) },
        seeds: five.into(),
    });
    SwatReport {
        title: "Secure tuning of smollm2-135m-instruct".into(),
        subtitle: "Harmless tuning data in a new answer style; five training seeds; warm-up on the robust modules for 800 \
                   steps, then all parameters for 400."
            .into(),
        findings: "Plain tuning on harmless data takes the model's refusals away: attack success rises from 2.1 % to \
                   91.2 %. Warming up on Mods_Rob first ends at 53.8 % with the same task score.\n\nMixing 10 % refusals \
                   into the data is cheaper and safer than either; it costs 6 % over-refusal. Repeat with `swat run \
                   demo.toml`."
            .into(),
        results: Some(results),
        sets,
        robustness: Some(Robustness {
            score: "the probe's gap".into(),
            perturbation: "gaussian noise, ε = 1.2, 4 antithetic pairs a cell".into(),
            cells,
            mods: chosen.clone(),
            seeds: vec![1, 2, 3, 4],
        }),
        mods: Some(Mods {
            all,
            chosen,
            agreement,
            trainable_share: 0.402,
            joint_score: Some((0.048, 0.05)),
            seeds: vec![1, 2, 3, 4],
        }),
        updates: Some(updates),
        drift: Some(Drift {
            settings: vec![
                drift(Plain, "plain", 1.0),
                drift(Swat, "SWAT", 0.45),
                drift(Refusals, "10 % refusals", 0.04),
            ],
            probe_score: "gap of the last layer's probe, logits".into(),
            note: "Mean ± standard error over seeds 1–5".into(),
        }),
        losses: vec![loss(Plain, "plain", 0.008, 1), loss(Swat, "SWAT", 0.005, 5000)],
        footer: Footer {
            seeds: vec![("training".into(), vec![1, 2, 3, 4, 5]), ("probe".into(), vec![7])],
            versions: vec![
                ("swat".into(), "0.1.0".into()),
                ("Model".into(), "blake3 6f1c0a54d2b7".into()),
                ("Device".into(), "cpu, 2 threads".into()),
            ],
            wall_time: Some(Duration::from_secs(3 * 3600 + 17 * 60)),
            command: "swat run demo.toml --set train.lr=2e-5 --out results/demo".into(),
        },
    }
}

/// Every drawing of a page.
fn drawings(report: &SwatReport) -> Vec<(String, String)> {
    report.page().sections.into_iter().flat_map(|s| s.figures).map(|f| (f.name, f.svg)).collect()
}

/// The part of a page that browsers could load something from.
fn foreign_addresses(html: &str) -> Vec<&str> {
    let schemes = ["http:", "https:", "ftp:", "//", "url(", "@import", "src=", "href=\"/", "javascript:", "data:"];
    // The namespace of a drawing is a name, which nothing loads.
    html.split("http://www.w3.org/2000/svg")
        .flat_map(|part| schemes.into_iter().filter(|s| part.contains(s)).collect::<Vec<_>>())
        .collect()
}

#[test]
fn the_example_page_is_whole_and_self_contained() {
    let report = example();
    let html = report.page().html();
    let out = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(out.join("report.html"), &html).unwrap();
    std::fs::write(out.join("heatmap.png"), robustness_map(report.robustness.as_ref().unwrap()).png(2).unwrap())
        .unwrap();
    std::fs::write(out.join("mods.png"), mods_map(report.mods.as_ref().unwrap()).png(2).unwrap()).unwrap();

    assert_eq!(foreign_addresses(&html), Vec::<&str>::new());
    for needed in
        ["prefers-color-scheme: dark", "@media print", "<nav", "<main>", "width=device-width", "<h1>", "<footer>"]
    {
        assert!(html.contains(needed), "{needed} is missing");
    }
    let expected = ["results", "sets", "robustness", "mods", "updates", "drift-probe", "drift-refusal", "loss"];
    let drawings = drawings(&report);
    assert_eq!(drawings.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), expected);
    for (name, svg) in drawings {
        std::fs::write(out.join(format!("{name}.svg")), &svg).unwrap();
        let names = check_xml(&svg).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(names[..3], ["svg", "title", "desc"], "{name}");
    }
    assert_eq!(html, example().page().html(), "the same input gives the same bytes");
}

#[test]
fn hostile_text_stays_text() {
    let calm = example().page().html();
    let count = |html: &str, tag: &str| html.matches(tag).count();
    for text in HOSTILE {
        let mut report = example();
        let t = || text.to_owned();
        (report.title, report.subtitle, report.findings) = (t(), t(), t());
        let results = report.results.as_mut().unwrap();
        results.intervals = t();
        results.rows.iter_mut().for_each(|row| row.setting.name = t());
        report.sets.iter_mut().for_each(|set| set.setting.name = t());
        let robustness = report.robustness.as_mut().unwrap();
        (robustness.score, robustness.perturbation) = (t(), t());
        let drift = report.drift.as_mut().unwrap();
        (drift.probe_score, drift.note) = (t(), t());
        drift.settings.iter_mut().for_each(|s| s.setting.name = t());
        report.updates.as_mut().unwrap().settings.iter_mut().for_each(|s| s.setting.name = t());
        report.losses.iter_mut().for_each(|s| s.setting.name = t());
        report.footer.command = t();
        report.footer.versions = vec![(t(), t())];
        report.footer.seeds = vec![(t(), vec![1])];
        for (name, svg) in drawings(&report) {
            check_xml(&svg).unwrap_or_else(|e| panic!("{name} with {text:?}: {e}"));
        }
        let html = report.page().html();
        for tag in ["<script", "</script", "</style", "<svg", "</svg", "<section", "</head"] {
            assert_eq!(count(&html, tag), count(&calm, tag), "{tag} with {text:?}");
        }
        assert!(!html.contains("<img") && !html.contains("<i>") && !html.contains("<b>"), "{text:?}");
        assert!(!html.contains(['\u{0}', '\u{1b}', '\u{202e}']), "{text:?}");
    }
}

#[test]
fn hostile_numbers_give_drawings() {
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN, 5e-324, 0.0, -0.0, 1e300];
    let points =
        odd.iter().enumerate().map(|(i, y)| Point { x: *y, y: odd[odd.len() - 1 - i], interval: Some((*y, -*y)) });
    let series = LineSeries { name: "odd".into(), tone: Tone::Blue, points: points.collect() };
    let panels = vec![LinePanel { y_label: "y".into(), series: vec![series], at_least: Some((f64::NAN, f64::MAX)) }];
    check_xml(&LineChart { panels, ..LineChart::default() }.svg()).unwrap();
    for direction in [Direction::Lying, Direction::Upright] {
        let bars = odd.iter().map(|v| Some(Bar { value: *v, interval: Some((-*v, *v)) })).collect();
        let series = vec![BarSeries { name: "odd".into(), tone: Tone::Blue, bars }];
        let panels = vec![BarPanel { heading: String::new(), series }, BarPanel::default()];
        let categories = vec!["a rather long name of a category".repeat(20); odd.len() + 3];
        check_xml(&BarChart { panels, categories, direction, ..BarChart::default() }.svg()).unwrap();
    }
    for ramp in [Ramp::Sequential, Ramp::Diverging, Ramp::Share] {
        let values: Vec<Option<f64>> = odd.iter().copied().map(Some).collect();
        let mut map = map_of(3, 4, values.clone(), Scale::fit(ramp, &values));
        map.marks = vec![true; 99];
        map.wide_rows = vec![2, 77];
        check_xml(&map.svg()).unwrap();
        map.png(1).unwrap();
    }
    let empty = map_of(0, 0, Vec::new(), Scale::fit(Ramp::Sequential, &[]));
    check_xml(&empty.svg()).unwrap();
    empty.png(1).unwrap();
    check_xml(&LineChart::default().svg()).unwrap();
    check_xml(&BarChart::default().svg()).unwrap();
}

#[test]
fn a_deep_model_with_long_names_fits() {
    let mut report = example();
    let mut cells = Vec::new();
    for layer in 0..80 {
        let kinds = ModuleKind::ALL.into_iter().map(|kind| Cell::module(layer, kind));
        for (at, cell) in kinds.chain([Cell::Norms(layer)]).enumerate() {
            cells.push(CellScore { cell, mean: noise((layer * 8 + at) as u64) - 0.2, std_error: f64::NAN });
        }
    }
    cells.extend([Cell::Embedding, Cell::FinalNorm, Cell::Head].map(|cell| CellScore {
        cell,
        mean: 0.9,
        std_error: 0.1,
    }));
    cells.retain(|s| s.cell.layer() != Some(41) || matches!(s.cell, Cell::Module(m) if m.kind.in_attention()));
    let robustness = report.robustness.as_mut().unwrap();
    robustness.cells = cells;
    report.mods.as_mut().unwrap().agreement.clear();
    let long = |name: &mut String, i: usize| {
        *name = format!("setting {i} with a name that is far too long for any column of any chart")
    };
    for (i, row) in report.results.as_mut().unwrap().rows.iter_mut().enumerate() {
        long(&mut row.setting.name, i);
    }
    for (i, run) in report.drift.as_mut().unwrap().settings.iter_mut().enumerate() {
        long(&mut run.setting.name, i);
    }
    let map = robustness_map(report.robustness.as_ref().unwrap());
    assert_eq!((map.rows.len(), map.columns.len(), map.wide_rows.clone()), (83, 8, vec![0, 81, 82]));
    assert!(map.svg().contains("no value"));
    for (name, svg) in drawings(&report) {
        check_xml(&svg).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let out = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(out.join("deep.html"), report.page().html()).unwrap();
    std::fs::write(out.join("deep.png"), map.png(2).unwrap()).unwrap();
}

#[test]
fn a_layer_index_from_a_file_does_not_size_the_map() {
    let scores =
        [3, usize::MAX].map(|l| CellScore { cell: Cell::module(l, ModuleKind::Q), mean: 0.1, std_error: f64::NAN });
    let map = robustness_map(&Robustness { cells: scores.to_vec(), ..Robustness::default() });
    assert_eq!(map.rows, ["3".to_owned(), usize::MAX.to_string()]);
}

fn map_of(rows: usize, columns: usize, values: Vec<Option<f64>>, scale: Scale) -> Heatmap {
    Heatmap {
        title: "A map".into(),
        row_label: "layer".into(),
        rows: (0..rows).map(|r| r.to_string()).collect(),
        columns: (0..columns).map(|c| format!("c{c}")).collect(),
        values,
        errors: Vec::new(),
        marks: Vec::new(),
        mark_label: "marked".into(),
        wide_rows: Vec::new(),
        scale,
        unit: "a unit".into(),
        note: String::new(),
    }
}

#[test]
fn tables_as_text() {
    let mut table = Table::new("Results").column("Setting").numbers("ASR %", "lower is safer").numbers("Margin", "");
    table.row(["as given".into(), Entry::interval(2.1, 0.9, 4.8, 1), Entry::plus_minus(8.41, 0.13, 2)]);
    table.row(["plain 水".into(), Entry::interval(91.2, 86.8, 94.3, 1), Entry::missing()]);
    table.row(["evil\u{1b}[2J\nname".into(), Entry::fixed(f64::NAN, 1)]);
    table.note = "95 % intervals".into();
    let expected = "\
Results
Setting                   ASR %       Margin
─────────────  ────────────────  ───────────
as given        2.1   (0.9–4.8)  8.41 ± 0.13
plain 水       91.2 (86.8–94.3)     –
evil\u{fffd}[2J name     –
95 % intervals
";
    assert_eq!(table.text(TextStyle::Unicode), expected);
    let ascii = table.text(TextStyle::Ascii);
    assert!(ascii.is_ascii() && ascii.contains("8.41 +- 0.13") && ascii.contains("2.1   (0.9-4.8)"), "{ascii}");
    let markdown = table.markdown();
    assert!(
        markdown.contains(
            "| Setting | ASR % | Margin |\n| --- | ---: | ---: |\n| as given | 2.1 (0.9–4.8) | 8.41 ± 0.13 |"
        )
    );
    let mut pipes = Table::new("").column("a");
    pipes.row(["x | y `z` <b> [l](u)".into()]);
    assert!(pipes.markdown().ends_with("| x \\| y \\`z\\` &lt;b&gt; \\[l\\](u) |\n"), "{}", pipes.markdown());
}

#[test]
fn results_as_text() {
    let text = results_table(&example().results.unwrap()).text(TextStyle::Unicode);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].starts_with("Setting ") && lines[1].ends_with("Seeds"));
    let swat = lines.iter().find(|l| l.starts_with("SWAT")).unwrap();
    for part in ["53.8  (47.8–59.8)", "96.3 (95.0–97.6)", "1,200", "40.2", "1–5"] {
        assert!(swat.contains(part), "{part} is missing in {swat}");
    }
}

#[test]
fn pictures_decode() {
    let report = example();
    let map = robustness_map(report.robustness.as_ref().unwrap());
    for magnification in [1, 2, 3] {
        let bytes = map.png(magnification).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width as usize, info.height as usize), map.png_size(magnification));
        let colors: HashSet<&[u8]> = pixels.chunks_exact(3).collect();
        assert!(colors.len() > 50, "a scale and cells, not {} colours", colors.len());
        // The largest value is the brightest colour of the ramp, and it is on the picture.
        assert!(colors.contains(&[0xfd, 0xe7, 0x25][..]));
    }
}

#[test]
fn outliers_do_not_flatten_a_scale() {
    let mut values: Vec<Option<f64>> = (0..100).map(|i| Some(f64::from(i) / 1000.0)).collect();
    values[0] = Some(50.0);
    let scale = Scale::fit(Ramp::Sequential, &values);
    assert!(scale.high < 0.11, "{scale:?}");
    let svg = map_of(10, 10, values, scale).svg();
    assert!(svg.contains("the largest value is 50.0"), "the drawing says that its colours end early");
}

#[test]
fn traces_follow_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let (host, kernels) = (Track { pid: 1, tid: 1 }, Track { pid: 2, tid: 7 });
    let mut trace = TraceWriter::create(&path).unwrap();
    trace.name_process(1, "host").unwrap();
    trace.name_process(2, "cuda:0").unwrap();
    trace.name_track(host, "main").unwrap();
    trace.name_track(kernels, "stream \"0\" </script>\u{1}").unwrap();
    trace.complete(host, "step 1", "train", 1_000, 90_001, Map::new()).unwrap();
    trace.complete(host, "forward", "train,phase", 2_500, 40_000, Map::new()).unwrap();
    for i in 0..3 {
        let args = json!({ "bytes": 1u64 << 40, "shape": [8, 576] }).as_object().cloned().unwrap();
        trace.complete(kernels, "gemm_bf16", "kernel", 3_000 + i * 10_001, 10_000, args).unwrap();
    }
    trace.counter(2, "memory", u64::MAX, 3 << 30).unwrap();
    assert!(!path.exists(), "an unfinished trace is not there");
    let events = trace.finish().unwrap();

    let json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(json["displayTimeUnit"], "ms");
    let list = json["traceEvents"].as_array().unwrap();
    assert_eq!(list.len() as u64, events);
    rules::check(list);
    assert_eq!(list.iter().filter(|e| e["ph"] == "X").map(|e| e["ts"].as_f64().unwrap()).next(), Some(1.0));
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"ts\":2.500,\"dur\":40.000") && text.contains("\"dur\":90.001"), "times are not rounded");

    drop(TraceWriter::create(&dir.path().join("dropped.json")).unwrap());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a dropped trace leaves nothing");
    assert!(TraceWriter::create(&dir.path().join("no/such/dir.json")).is_err());
}
