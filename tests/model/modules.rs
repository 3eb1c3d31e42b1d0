//! Module sets as text and back.

use proptest::prelude::*;
use swat::modules::{Cell, LearningRates, ModuleKind, ModuleSet, RateTable};

fn all(layers: usize, tied: bool) -> ModuleSet {
    let mut set = ModuleSet::from_iter([Cell::Embedding, Cell::FinalNorm]);
    for layer in 0..layers {
        set.insert(Cell::Norms(layer));
        for kind in ModuleKind::ALL {
            set.insert(Cell::module(layer, kind));
        }
    }
    if !tied {
        set.insert(Cell::Head);
    }
    set
}

fn parse(text: &str) -> ModuleSet {
    ModuleSet::parse(text, &all(32, false)).unwrap()
}

fn error(text: &str) -> String {
    ModuleSet::parse(text, &all(32, true)).unwrap_err().to_string()
}

#[test]
fn patterns() {
    assert_eq!(parse("all"), all(32, false));
    assert_eq!(parse("none"), ModuleSet::default());
    assert_eq!(parse("modules").len(), 7 * 32);
    assert_eq!(parse("layers.8-15.{q_proj,v_proj}").len(), 16);
    assert_eq!(parse("layers.8-15.{q, v}"), parse("layers.8-15.q layers.8-15.v_proj"));
    assert_eq!(parse("layers.*.o_proj").len(), 32);
    assert_eq!(parse("layers.3").len(), 8);
    assert_eq!(parse("q_proj,v"), parse("layers.*.{q,v}"));
    assert_eq!(parse("all-linear"), parse("modules"));
    assert_eq!(parse("layers.0-3.norms,embed_tokens norm, lm_head").len(), 7);
    assert_eq!(parse("layers.0-3.modules").len(), 28);
    assert_eq!(all(32, false).difference(&parse("modules")).len(), 35);
    assert_eq!(parse("norm").union(&parse("lm_head")).len(), 2);
    assert_eq!(parse("all").difference(&parse("layers.*")), parse("embed_tokens norm lm_head"));
}

#[test]
fn canonical_text() {
    for (text, canonical) in [
        ("layers.8.q layers.9.q,layers.10.q", "layers.8-10.q_proj"),
        ("layers.0-3.v layers.2-4.q", "layers.0-1.v_proj,layers.2-3.{q_proj,v_proj},layers.4.q_proj"),
        ("norm layers.31 embed_tokens", "embed_tokens,layers.31,norm"),
        ("layers.0-1.modules", "layers.0-1.modules"),
        ("layers.5.{norms,down}", "layers.5.{down_proj,norms}"),
        ("none", "none"),
    ] {
        assert_eq!(parse(text).to_string(), canonical);
    }
}

#[test]
fn errors_name_the_offender() {
    assert!(error("layers.3.q_porj").contains("`q_porj`") && error("layers.3.q_porj").contains("`q_proj`?"));
    assert!(error("layers.40.q").contains("layer 40; expected a layer from 0 to 31"));
    assert!(error("layers.0-99999999999999999999999.q").contains("layer 99999999999999999999999"));
    assert!(error("layers.7-3").contains("3-7"));
    assert!(error("lm_head").contains("tied"));
    assert!(error("embed_token").contains("`embed_tokens`?"));
    assert!(error("").contains("no pattern"));
    for text in ["layers.", "layers.a", "layers.-1", "layers.1-", "layers.1.", "layers.1.{}", "layers.+1"] {
        error(text);
    }
    for text in ["layers.1.{q", "layers.1.q}", "layers.1.{{q}}", "layers.1.{q}x"] {
        error(text);
    }
}

#[test]
fn rate_tables_scale_what_trains() {
    let all = all(4, true);
    let table: RateTable = "layers.*.{q,v}=0.5, layers.1-2.q_proj=0,norm=2".parse().unwrap();
    assert_eq!(table.to_string(), "layers.*.{q,v}=0.5,layers.1-2.q_proj=0,norm=2");
    assert_eq!(table.to_string().parse::<RateTable>().unwrap(), table);
    let set = ModuleSet::parse("layers.*.{q,k},norm", &all).unwrap();
    let mut rates = LearningRates::masked(&set, &all, 0.25);
    rates.scale(&table, &all).unwrap();
    let rate = |pattern: &str| {
        let cell = ModuleSet::parse(pattern, &all).unwrap().iter().next().unwrap();
        rates.get(cell).map(|rate| (rate.lr, rate.weight_decay))
    };
    // By hand: in the set, outside of it, frozen by the later entry, and without an entry.
    assert_eq!(rate("layers.0.q"), Some((0.5, 1.0)));
    assert_eq!(rate("layers.0.v"), Some((0.125, 1.0)));
    assert_eq!((rate("layers.1.q"), rate("layers.3.q")), (None, Some((0.5, 1.0))));
    assert_eq!(
        (rate("norm"), rate("layers.2.k"), rate("layers.2.o")),
        (Some((2.0, 1.0)), Some((1.0, 1.0)), Some((0.25, 1.0)))
    );
    for text in ["", "layers.0.q", "layers.0.q=", "layers.0.q=-1", "layers.0.q=nan", "=1", "q=1,k"] {
        let message = text.parse::<RateTable>().unwrap_err().to_string();
        assert!(message.contains("SET=FACTOR") || message.contains("no pattern"), "{text}: {message}");
    }
    let unknown = "layers.9.q=1".parse::<RateTable>().unwrap();
    assert!(rates.scale(&unknown, &all).unwrap_err().to_string().contains("layer 9"));
}

proptest! {
    #[test]
    fn text_reads_back(bits in proptest::collection::vec(any::<bool>(), 51), tied: bool) {
        let all = all(6, tied);
        let set: ModuleSet = all.iter().zip(bits).filter(|(_, bit)| *bit).map(|(cell, _)| cell).collect();
        prop_assert_eq!(ModuleSet::parse(&set.to_string(), &all).unwrap(), set);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[a-z_.{},*0-9 -]{0,40}|.{0,20}") {
        let _ = ModuleSet::parse(&text, &all(3, false));
    }
}
