//! Pages, drawings, tables and traces: escaping, self-containedness, well-formed SVG.

use crate::common::trace as rules;
use crate::xml::check_xml;
use serde_json::{Map, Value, json};
use swat::report::chart::{
    BarChart, BarPanel, BarSeries, Direction, Dot, DotGroup, LineChart, LineSeries, Measure, Point, Scatter,
};
use swat::report::heatmap::{Row, Tile};
use swat::report::page::{Figure, Footer, Highlight, Section};
use swat::report::table::{Entry, Table};
use swat::report::trace::{Trace, Track};
use swat::report::{Heatmap, Ramp, Report, Tone};

const HOSTILE: [&str; 5] = [
    "</script><img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "a & b < c > d ]]> <!-- \u{0}\u{1b}[31m \u{202e}",
    "</title></style></svg>",
    "`<b>` ` <i>",
];

/// A drawing of each kind, every text of which is `text`.
fn drawings(text: &str) -> Vec<Figure> {
    let t = || text.to_owned();
    let y = Measure { value: 0.5, interval: Some((0.25, 0.75)) };
    let points = vec![Point { x: 0.0, y }, Point { x: 1.0, y: Measure::new(0.125) }];
    let series = vec![LineSeries { name: t(), tone: Tone::Blue, points }];
    let lines = LineChart { title: t(), x_label: t(), y_label: t(), series, note: t(), ..LineChart::default() };
    let bars = |direction| {
        let series = vec![BarSeries { name: t(), tone: Tone::Amber, bars: vec![Some(y), None] }];
        let panels = vec![BarPanel { heading: t(), series }];
        let (value_label, category_label, categories) = (t(), t(), vec![t(), t()]);
        BarChart { title: t(), value_label, category_label, categories, panels, direction, note: t(), at_least: 1.0 }
    };
    let dots = vec![Dot { name: t(), x: 1.0, y }, Dot { name: t(), x: 2.0, y }];
    let groups = vec![DotGroup { name: t(), tone: Tone::Pink, dots }];
    let scatter = Scatter { title: t(), x_label: t(), y_label: t(), groups, y_at_least: 1.0, note: t() };
    let mut map = map_of(2, 3, &[Some(0.5), None, Some(0.1), Some(0.2), Some(0.3), Some(0.9)], Ramp::Sequential);
    (map.title, map.row_label, map.unit, map.mark_label, map.note) = (t(), t(), t(), t(), t());
    map.columns.fill(t());
    map.rows.iter_mut().for_each(|row| row.name = t());
    map.rows[0].tiles[0].marked = true;
    let svgs =
        [lines.svg(), bars(Direction::Horizontal).svg(), bars(Direction::Upright).svg(), scatter.svg(), map.svg()];
    svgs.into_iter().map(|svg| Figure { name: t(), svg, caption: t(), wide: false }).collect()
}

/// A page, every text of which is `text`.
fn page(text: &str) -> Report {
    let t = || text.to_owned();
    let mut table = Table::new(t()).column(t()).numbers(t(), t());
    table.row([Entry::text(t()), Entry::interval(1.0, Some((0.5, 2.0)), 1)]);
    table.row([Entry { text: t(), detail: t(), order: None }]);
    (table.note, table.emphasized) = (t(), vec![1]);
    let section = Section { heading: t(), text: t(), figures: drawings(text), tables: vec![table] };
    Report {
        title: t(),
        subtitle: t(),
        highlights: vec![Highlight { label: t(), value: t(), detail: t(), tone: Tone::Blue }],
        sections: vec![section; 2],
        footer: Footer { command: t(), items: vec![(t(), t())] },
    }
}

/// Addresses in a page from which a browser could load something.
fn foreign_addresses(html: &str) -> Vec<&str> {
    let schemes = ["http:", "https:", "ftp:", "//", "url(", "@import", "src=", "href=\"/", "javascript:", "data:"];
    // The namespace of a drawing is a name, which nothing loads.
    html.split("http://www.w3.org/2000/svg")
        .flat_map(|part| schemes.into_iter().filter(|s| part.contains(s)).collect::<Vec<_>>())
        .collect()
}

#[test]
fn a_page_is_well_formed_and_self_contained() {
    let html = page("calm").html().unwrap();
    assert_eq!(foreign_addresses(&html), Vec::<&str>::new());
    for needed in [
        "prefers-color-scheme: dark",
        "@media print",
        "<li><a href=\"#section-2\">calm</a></li>",
        "<main>",
        "width=device-width",
        "<h1>calm</h1>",
        "<footer>",
        "<dt>Command</dt><dd><code>calm</code></dd>",
        "<th scope=\"col\" class=\"n\">calm<small>calm</small></th>",
        "<th scope=\"row\" data-order=\"calm\">calm</th>",
        "<td class=\"n\" data-order=\"1.0\">1.0<small>(0.5–2.0)</small></td>",
        "<tr class=\"strong\"><th scope=\"row\" data-order=\"calm\">calm<small>calm</small></th>",
        "<td class=\"n\" data-order=\"\"></td></tr>",
        ".b-blue { --tone: #0072b2; }",
    ] {
        assert!(html.contains(needed), "{needed} is missing");
    }
    assert_eq!(html, page("calm").html().unwrap(), "the same input gives the same bytes");
    // What is not there leaves nothing behind.
    let empty = Report::default().html().unwrap();
    for part in ["<nav", "<footer", "<dl", "<section", "class=\"subtitle\""] {
        assert!(!empty.contains(part), "{part}");
    }
}

#[test]
fn backticks_become_code() {
    let text = "first `a < b`, then ``, then `alone\n\nsecond".to_owned();
    let report = Report { sections: vec![Section { text, ..Section::default() }], ..Report::default() };
    let html = report.html().unwrap();
    let expected = "<p>first <code>a &lt; b</code>, then <code></code>, then `alone</p>\n<p>second</p>\n</section>";
    assert!(html.contains(expected), "{html}");
}

#[test]
fn hostile_text_is_escaped() {
    let calm = page("calm").html().unwrap();
    for text in HOSTILE {
        for figure in drawings(text) {
            let names = check_xml(&figure.svg).unwrap_or_else(|e| panic!("{text:?}: {e}: {}", figure.svg));
            assert_eq!(names[..3], ["svg", "title", "desc"], "{text:?}");
        }
        let html = page(text).html().unwrap();
        for tag in ["<script", "</script", "</style", "<svg", "</svg", "<section", "</head"] {
            assert_eq!(html.matches(tag).count(), calm.matches(tag).count(), "{tag} with {text:?}");
        }
        assert!(!html.contains("<img") && !html.contains("<i>") && !html.contains("<b>"), "{text:?}");
        assert!(!html.contains(['\u{0}', '\u{1b}', '\u{202e}']), "{text:?}");
    }
}

#[test]
fn extreme_numbers_give_valid_drawings() {
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN, 5e-324, 0.0, -0.0, 1e300];
    let measure = |value: f64| Measure { value, interval: Some((value, -value)) };
    let points = odd.iter().zip(odd.iter().rev()).map(|(y, x)| Point { x: *x, y: measure(*y) }).collect();
    let series = vec![LineSeries { name: "odd".into(), tone: Tone::Blue, points }];
    check_xml(&LineChart { series, ..LineChart::default() }.svg()).unwrap();
    let dots = odd.iter().zip(odd.iter().rev()).map(|(y, x)| Dot { name: "odd".into(), x: *x, y: measure(*y) });
    let groups = vec![DotGroup { name: "odd".into(), tone: Tone::Blue, dots: dots.collect() }];
    check_xml(&Scatter { groups, y_at_least: f64::NAN, ..Scatter::default() }.svg()).unwrap();
    for direction in [Direction::Horizontal, Direction::Upright] {
        let bars = odd.iter().map(|v| Some(measure(*v))).collect();
        let series = vec![BarSeries { name: "odd".into(), tone: Tone::Blue, bars }];
        let panels = vec![BarPanel { heading: String::new(), series }, BarPanel::default()];
        let categories = vec!["a rather long name of a category".repeat(20); odd.len() + 3];
        check_xml(&BarChart { panels, categories, direction, ..BarChart::default() }.svg()).unwrap();
    }
    for ramp in [Ramp::Sequential, Ramp::Share] {
        let values: Vec<Option<f64>> = odd.iter().copied().map(Some).collect();
        let mut map = map_of(3, 4, &values, ramp);
        map.rows.iter_mut().flat_map(|row| &mut row.tiles).for_each(|tile| tile.marked = true);
        // One that spans all, one that is too short, one that is too long, and one of nothing.
        map.rows[0].tiles.truncate(1);
        map.rows[1].tiles.truncate(2);
        map.rows[2].tiles.extend([Tile::default(); 9]);
        map.rows.push(Row::default());
        check_xml(&map.svg()).unwrap();
    }
    check_xml(&map_of(0, 0, &[], Ramp::Sequential).svg()).unwrap();
    check_xml(&LineChart::default().svg()).unwrap();
    check_xml(&BarChart::default().svg()).unwrap();
    check_xml(&Scatter::default().svg()).unwrap();
}

/// Cells beyond `values` have no value.
fn map_of(rows: usize, columns: usize, values: &[Option<f64>], ramp: Ramp) -> Heatmap {
    let tile = |at: usize| Tile { value: values.get(at).copied().flatten(), ..Tile::default() };
    let row = |r: usize| Row { name: r.to_string(), tiles: (0..columns).map(|c| tile(r * columns + c)).collect() };
    Heatmap {
        title: "A map".into(),
        row_label: "layer".into(),
        columns: (0..columns).map(|c| format!("c{c}")).collect(),
        rows: (0..rows).map(row).collect(),
        ramp,
        unit: "a unit".into(),
        apart_label: "the others".into(),
        mark_label: "marked".into(),
        note: String::new(),
    }
}

#[test]
fn outliers_do_not_flatten_a_scale() {
    let mut values: Vec<Option<f64>> = (0..100).map(|i| Some(f64::from(i) / 1000.0)).collect();
    values[0] = Some(50.0);
    let svg = map_of(10, 10, &values, Ramp::Sequential).svg();
    assert!(svg.contains("The colour scale ends at 0.0960; the largest value is 50.0."), "{svg}");
    assert!(svg.contains("#fde725\" shape-rendering=\"crispEdges\"><title>layer 9, c6: 0.0960</title>"), "{svg}");
    values[0] = None;
    let svg = map_of(10, 10, &values, Ramp::Sequential).svg();
    assert!(!svg.contains("colour scale ends") && svg.contains("layer 0, c0: no value"), "{svg}");
    // A row of one tile has the weight of its area: here it is no outlier.
    let mut map = map_of(10, 10, &values, Ramp::Sequential);
    map.rows[9].tiles = vec![Tile { value: Some(50.0), ..Tile::default() }];
    assert!(!map.svg().contains("colour scale ends"));
    // On a scale of its own it leaves the others their colours.
    map.rows[9].tiles[0].apart = true;
    let svg = map.svg();
    assert!(svg.contains("the others, on a scale of their own") && !svg.contains("scale ends"), "{svg}");
    assert!(svg.contains("#fde725\" shape-rendering=\"crispEdges\"><title>layer 8, c9: 0.0890</title>"), "{svg}");
    let alone = map_of(10, 10, &values, Ramp::Sequential).svg();
    assert!(!alone.contains("scale of their own"), "{alone}");
}

#[test]
fn marked_cells_are_outlined() {
    let mut map = map_of(2, 2, &[Some(0.1), Some(0.2), Some(0.3), Some(0.4)], Ramp::Sequential);
    let mut segments = |marked: &[usize]| {
        for (i, tile) in map.rows.iter_mut().flat_map(|row| &mut row.tiles).enumerate() {
            tile.marked = marked.contains(&i);
        }
        // The last path is that of the map, those before it are of the legend.
        let svg = map.svg();
        svg.rsplit("<path d=\"").next().filter(|_| svg.contains("<path")).map(|path| path.split('M').count() - 1)
    };
    assert_eq!(segments(&[]), None);
    assert_eq!([segments(&[0]), segments(&[0, 1]), segments(&[0, 3]), segments(&[0, 1, 2, 3])], [4, 6, 8, 8].map(Some));
}

#[test]
fn tables_as_text() {
    let mut table = Table::new("Results").column("Setting").numbers("ASR %", "lower is safer").numbers("Margin", "");
    table.row(["as given".into(), Entry::interval(2.1, Some((0.9, 4.8)), 1), Entry::plus_minus(8.41, Some(0.13), 2)]);
    table.row(["plain 水".into(), Entry::interval(91.2, Some((86.8, 94.3)), 1), Entry::missing()]);
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
    assert_eq!(table.text(), expected);
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
fn traces_follow_the_rules() {
    let (host, kernels) = (Track { pid: 1, tid: 1 }, Track { pid: 2, tid: 7 });
    let mut trace = Trace::default();
    trace.name_process(1, "host");
    trace.name_process(2, "cuda:0");
    trace.name_track(host, "main");
    trace.name_track(kernels, "stream \"0\" </script>\u{1}");
    trace.complete(host, "step 1", "train", (1_000, 90_001), Map::new());
    trace.complete(host, "forward", "train,phase", (2_500, 40_000), Map::new());
    for i in 0..3 {
        let args = json!({ "bytes": 1u64 << 40, "shape": [8, 576] }).as_object().cloned().unwrap();
        trace.complete(kernels, "gemm_bf16", "kernel", (3_000 + i * 10_001, 10_000), args);
    }
    let text = trace.json();
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["displayTimeUnit"], "ms");
    let list = json["traceEvents"].as_array().unwrap();
    assert_eq!(list.len(), trace.events());
    rules::check(list);
    assert_eq!(list.iter().filter(|e| e["ph"] == "X").map(|e| e["ts"].as_f64().unwrap()).next(), Some(1.0));
    assert!(text.contains("\"ts\":2.500,\"dur\":40.000") && text.contains("\"dur\":90.001"), "times are not rounded");
}
