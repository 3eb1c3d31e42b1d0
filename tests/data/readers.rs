//! Properties of the data room: files of any bytes are read or refused, and loaders lose and repeat nothing.

use proptest::prelude::*;
use std::io::{Cursor, Write};
use swat::data::{Conversation, Example, Loader, LoaderOptions, LoaderPosition, RowReader, SecurityPrompt, Task};

/// Reads a file's bytes as each of the formats; none may panic, and errors name the file.
fn read_all(bytes: &[u8]) -> Result<(), TestCaseError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let path = file.path();
    let name = path.display();
    let errors = [
        Conversation::read(path, &mut RowReader::default()).err(),
        RowReader::default().read_from(Cursor::new(bytes.to_vec()), &format!("{name}.csv"), |_| Ok(())).err(),
        SecurityPrompt::read(path, 0, &mut RowReader::default()).err(),
        Task::read(path, &mut RowReader::default())
            .map(|tasks| tasks.iter().filter(|t| t.matches(&t.prompt)).count())
            .err(),
    ];
    for error in errors.into_iter().flatten() {
        prop_assert!(error.to_string().starts_with(&path.display().to_string()), "{}", error);
        prop_assert_eq!(error.exit_code(), 2);
    }
    Ok(())
}

/// JSON made of the words that the formats look for.
fn json() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("instruction"),
        Just("output"),
        Just("input"),
        Just("conversations"),
        Just("from"),
        Just("value"),
        Just("messages"),
        Just("role"),
        Just("content"),
        Just("user"),
        Just("assistant"),
        Just("system"),
        Just("human"),
        Just("gpt"),
        Just("prompt"),
        Just("completion"),
        Just("label"),
        Just("harmful"),
        Just("benign"),
        Just("pair"),
        Just("split"),
        Just("train"),
        Just("answer"),
        Just("match"),
        Just("exact"),
        Just("number"),
        Just("choice"),
        Just("type"),
        Just("text"),
        Just("A"),
        Just("\\n"),
        Just("\\ud800"),
        Just(""),
    ];
    let quoted = word.prop_map(|w| format!("\"{w}\""));
    let leaf =
        prop_oneof![6 => quoted.clone(), 1 => Just("null".to_string()), 1 => any::<f32>().prop_map(|x| x.to_string())];
    let value = leaf.prop_recursive(4, 32, 4, {
        let quoted = quoted.clone();
        move |inner| {
            let pair = (quoted.clone(), inner.clone()).prop_map(|(k, v)| format!("{k}:{v}"));
            prop_oneof![
                prop::collection::vec(inner, 0..4).prop_map(|v| format!("[{}]", v.join(","))),
                prop::collection::vec(pair, 0..4).prop_map(|v| format!("{{{}}}", v.join(","))),
            ]
        }
    });
    prop::collection::vec((quoted, value), 0..6).prop_map(|pairs| {
        let pairs: Vec<String> = pairs.into_iter().map(|(k, v)| format!("{k}:{v}")).collect();
        format!("{{{}}}", pairs.join(","))
    })
}

fn examples(lengths: &[usize]) -> Vec<Example> {
    let example = |(id, &length): (usize, &usize)| Example {
        tokens: vec![id as u32; length],
        trained: vec![true; length],
        replayed: false,
    };
    lengths.iter().enumerate().map(example).collect()
}

prop_compose! {
    fn any_loader()(
        lengths in prop::collection::vec(1usize..=16, 1..80),
        batch_size in 1usize..7,
        max_length in 16usize..40,
        packing: bool,
        shuffle: bool,
        seed: u64,
    ) -> (Vec<Example>, LoaderOptions) {
        (examples(&lengths), LoaderOptions { batch_size, max_length, packing, shuffle, seed })
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        read_all(&bytes)?;
    }

    #[test]
    fn any_objects_are_read_or_refused(lines in prop::collection::vec(json(), 0..4)) {
        read_all(lines.join("\n").as_bytes())?;
    }

    #[test]
    fn an_epoch_holds_every_example_once_and_whole((all, options) in any_loader()) {
        let mut loader = Loader::new(all.clone(), options.clone()).unwrap();
        for epoch in 0..2 {
            let mut seen = Vec::new();
            for batch in 0..loader.batches_per_epoch() {
                prop_assert_eq!(loader.position(), LoaderPosition { epoch, batch });
                let last = batch + 1 == loader.batches_per_epoch();
                let documents = loader.next_documents();
                let tokens: usize = documents.iter().map(|e| e.tokens.len()).sum();
                prop_assert!(tokens <= options.batch_size * options.max_length);
                if !options.packing {
                    prop_assert!(documents.len() == options.batch_size || last && !documents.is_empty());
                }
                seen.extend(documents.into_iter().cloned());
            }
            seen.sort_by_key(|e| e.tokens[0]);
            prop_assert_eq!(&seen, &all);
        }
    }

    #[test]
    fn after_a_seek_batches_are_those_of_an_uninterrupted_run((all, options) in any_loader(), before in 0usize..60, after in 1usize..30) {
        let mut whole = Loader::new(all.clone(), options.clone()).unwrap();
        (0..before).for_each(|_| drop(whole.next_documents()));
        let saved = serde_json::to_string(&whole.position()).unwrap();
        let mut resumed = Loader::new(all, options).unwrap();
        resumed.seek(serde_json::from_str(&saved).unwrap()).unwrap();
        for _ in 0..after {
            prop_assert_eq!(whole.next_documents(), resumed.next_documents());
            prop_assert_eq!(whole.position(), resumed.position());
        }
    }
}

#[test]
fn a_missing_file_and_a_directory_are_input_errors() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().join("none.jsonl"), folder.path().to_path_buf()] {
        assert_eq!(Conversation::read(&path, &mut RowReader::default()).unwrap_err().exit_code(), 2);
    }
}
