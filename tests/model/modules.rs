//! Module sets as text and back.

use proptest::prelude::*;
use swat::modules::{Cell, ModuleKind, ModuleSet};

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
