//! Parquet files, as pyarrow writes them (files/make.py), and hostile ones.

use proptest::prelude::*;
use std::path::{Path, PathBuf};
use swat::data::{Conversation, Row, RowOptions, RowReader};
use swat::error::Result;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/files").join(name)
}

fn rows(path: &Path) -> Result<Vec<Row>> {
    RowReader::default().read(path, |row| Ok(row.clone()))
}

fn message(name: &str) -> String {
    let error = rows(&file(name)).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn conversations_are_lists_of_structs() {
    let skip = RowOptions { skip_bad_rows: true, ..RowOptions::default() };
    let mut reader = RowReader::new(&skip);
    let read = Conversation::read(&file("messages.parquet"), &mut reader).unwrap();
    let texts = |c: &Conversation| c.messages.iter().map(|m| format!("{}:{}", m.role, m.content)).collect::<Vec<_>>();
    assert_eq!(texts(&read[0]), ["user:Q1", "assistant:A1"]);
    assert_eq!(texts(&read[1]), ["system:S", "user:Q2 é", "assistant:A2", "user:Q3", "assistant:A3"]);
    // The null of a field that other turns have is no field.
    assert!(read.iter().flat_map(|c| &c.messages).all(|m| m.fields.is_empty()));
    let [skipped] = reader.skipped() else { panic!() };
    assert_eq!((read.len(), skipped.rows), (2, 2));
    assert!(skipped.first[0].contains("messages.parquet: row 3: found no turns"), "{:?}", skipped.first);
    assert!(skipped.first[1].contains("messages.parquet: row 4: found `messages` is null"), "{:?}", skipped.first);

    let all = rows(&file("messages.parquet")).unwrap();
    let scores: Vec<_> = all.iter().map(|row| row.fields["score"].as_f64()).collect();
    assert_eq!(scores, [Some(0.5), None, None, None]);
}

#[test]
fn pages_of_both_versions_and_other_types_are_read() {
    let all = rows(&file("pairs.parquet")).unwrap();
    assert_eq!(all.len(), 300);
    let row = &all[299];
    assert!(row.place.ends_with("pairs.parquet: row 300"), "{}", row.place);
    assert_eq!((row.text("question").unwrap(), row.text("response").unwrap()), ("Q299", "A4"));
    assert_eq!((row.get("weight"), row.get("raw")), (Some(&1.into()), None));
    assert_eq!(row.get("when"), Some(&1_700_000_000_299i64.into()));
    assert!(all[7].text("response").unwrap_err().to_string().contains("row 8: found `response` is null"));
}

#[test]
fn texts_in_delta_encodings_are_read() {
    for name in ["delta1.parquet", "delta2.parquet"] {
        let all = rows(&file(name)).unwrap();
        assert_eq!(all.len(), 300, "{name}");
        for (i, row) in all.iter().enumerate() {
            assert_eq!(row.text("prompt").unwrap(), format!("Question {} of {i}", i / 7), "{name}");
            let completion = format!("{}{i}", "A".repeat(i % 40));
            let found = row.get("completion").and_then(|value| value.as_str());
            assert_eq!(found, (i != 7).then_some(completion.as_str()), "{name}");
            let tags: Vec<String> = (0..i % 4).map(|j| format!("tag{j}")).collect();
            assert_eq!(row.get("tags"), Some(&tags.into()), "{name}");
        }
    }
}

/// The reader allocates as many lengths as a page claims, and a text for each value that says "as before".
#[test]
fn texts_in_delta_encodings_are_checked_before_they_are_read() {
    let repeated = message("bomb_delta.parquet");
    assert!(repeated.contains("text of more than 256 times the file's size"), "{repeated}");
    // A block of 128 in four parts, and how many numbers there are: 2^42 in place of some.
    let bytes = std::fs::read(file("delta1.parquet")).unwrap();
    let heads: Vec<usize> = (0..bytes.len() - 8).filter(|at| bytes[*at..].starts_with(&[0x80, 0x01, 0x04])).collect();
    assert_eq!(heads.len(), 5, "{heads:?}");
    for at in heads {
        let mut claims = bytes.clone();
        claims[at + 3..at + 9].copy_from_slice(&[0x80, 0x80, 0x80, 0x80, 0x80, 0x40]);
        claims[at + 9] = 0x01;
        let damaged = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(damaged.path(), &claims).unwrap();
        let error = rows(damaged.path()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("lengths of texts"), "{error}");
    }
}

#[test]
fn what_a_file_claims_to_unpack_to_is_checked() {
    assert!(message("gzip.parquet").contains("its compression"), "{}", message("gzip.parquet"));
    let page = message("bomb_page.parquet");
    assert!(page.contains("more than 256 times its size"), "{page}");
    let list = message("bomb_list.parquet");
    assert!(list.contains("10000000 elements of lists in a group of rows"), "{list}");
}

/// Bytes of a file with one changed, or cut off: read or refused.
fn damaged(name: &str, at: usize, byte: u8, cut: bool) -> Result<(), TestCaseError> {
    let mut bytes = std::fs::read(file(name)).unwrap();
    let at = at % bytes.len();
    if cut {
        bytes.truncate(at)
    } else {
        bytes[at] = byte
    }
    let damaged = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(damaged.path(), &bytes).unwrap();
    if let Err(error) = rows(damaged.path()) {
        prop_assert_eq!(error.exit_code(), 2, "{}", error);
        prop_assert!(error.to_string().starts_with(&damaged.path().display().to_string()), "{}", error);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn damaged_files_are_read_or_refused(at in any::<usize>(), byte in any::<u8>(), cut in prop::bool::weighted(0.2), which in 0usize..2) {
        damaged(["messages.parquet", "pairs.parquet"][which], at, byte, cut)?;
    }
}
