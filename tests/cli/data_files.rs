//! Data files in other forms, and what the commands say of them.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn swat(command: &str, arguments: &[&str]) -> Output {
    let mut swat = Command::new(env!("CARGO_BIN_EXE_swat"));
    swat.arg(command).arg("--model").arg(model()).args(["--device", "cpu", "--dtype", "f32", "--json"]);
    swat.args(arguments).output().unwrap()
}

fn parsed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The message of a run that refuses its input.
fn refused(output: &Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty(), "{message}");
    message
}

fn write(dir: &Path, name: &str, text: impl AsRef<[u8]>) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// The same conversations in every form train the same model.
#[test]
fn the_form_of_a_file_does_not_change_what_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "{\"prompt\":\"pick one of kelm , dorb .\",\"completion\":\"kelm .\"}\n\
                 {\"prompt\":\"which is big ?\",\"completion\":\"dorb .\"}\n";
    let packed = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    let list = format!("[{}]", lines.trim().replace('\n', ","));
    let table = "question,response\r\n\"pick one of kelm , dorb .\",kelm .\r\nwhich is big ?,dorb .\r\n";
    let renamed: &[&str] = &["--columns", "prompt=question,answer=response"];
    let files: [(String, &[&str]); 5] = [
        (write(dir.path(), "a.jsonl", lines), &[]),
        (write(dir.path(), "b.json", &list), &[]),
        (write(dir.path(), "c.jsonl.zst", packed), &[]),
        (write(dir.path(), "d.csv", table), renamed),
        (write(dir.path(), "e.json", format!("{{\"data\": {list}}}")), &["--field", "data"]),
    ];
    let mut weights = Vec::new();
    for (i, (file, more)) in files.iter().enumerate() {
        let out = dir.path().join(format!("out{i}"));
        let tune = ["--data", file, "--steps", "1", "--lr", "1e-3", "--out", out.to_str().unwrap()];
        assert_eq!(parsed(&swat("tune", &[&tune, *more].concat()))["skipped_rows"], serde_json::json!([]));
        weights.push(std::fs::read(out.join("model.safetensors")).unwrap());
    }
    assert!(weights.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn bad_rows_are_refused_or_left_out_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let good = "{\"prompt\":\"which is big ?\",\"completion\":\"dorb .\"}\n";
    let file = write(dir.path(), "t.jsonl", format!("{good}\n{{\"prompt\":\"x\"\n{good}{{\"prompt\":\"x\"}}\n"));
    let out = dir.path().join("out");
    let tune = ["--data", &file, "--steps", "1", "--out", out.to_str().unwrap()];
    let message = refused(&swat("tune", &tune));
    assert!(message.contains("t.jsonl:3: found invalid JSON") && message.contains("t.jsonl:5: "), "{message}");
    assert!(message.contains("2 rows are bad (--skip-bad-rows"), "{message}");
    assert!(!out.exists());
    let output = swat("tune", &[&tune[..], &["--skip-bad-rows"]].concat());
    assert_eq!(parsed(&output)["skipped_rows"][0]["rows"], 2);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("2 bad rows left out") && message.contains("t.jsonl:3"), "{message}");
    let record: Value = serde_json::from_slice(&std::fs::read(out.join("tune.json")).unwrap()).unwrap();
    assert_eq!(record["config"]["skipped_rows"][0]["rows"], 2);

    let message =
        refused(&swat("tune", &[&tune[..], &["--force", "--skip-bad-rows", "--columns", "prompt=x"]].concat()));
    assert!(message.contains("no column `x` in any file"), "{message}");
}

/// What has no end, or is no file, is refused at once and by name; a pipe is read.
#[cfg(unix)]
#[test]
fn devices_sockets_and_endless_streams_are_refused() {
    use std::io::Write;
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let preview = |file: &str| swat("tune", &["--preview", "--data", file]);
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (file, found) in [
        ("/dev/zero", "a device or a terminal"),
        ("/dev/urandom", "a device or a terminal"),
        ("/dev/null", "a device or a terminal"),
        (socket.to_str().unwrap(), "a socket"),
        (dir.path().to_str().unwrap(), "a directory"),
    ] {
        let message = refused(&preview(file));
        assert!(message.contains(&format!("{file}: found {found}")), "{message}");
    }
    for (command, option) in
        [("tune", "--chat-template"), ("eval", "--security"), ("eval", "--task"), ("eval", "--refusals")]
    {
        let own: &[&str] =
            if command == "tune" { &["--preview", "--data", "x.jsonl"] } else { &["--security", "/dev/zero"] };
        refused(&swat(command, &[own, &[option, "/dev/zero"]].concat()));
    }
    refused(&swat("score", &["--text-file", "/dev/zero"]));
    let run = Command::new(env!("CARGO_BIN_EXE_swat")).args(["run", "/dev/zero"]).output().unwrap();
    assert!(refused(&run).contains("/dev/zero: found a device"));
    assert!(refused(&preview("-")).contains("-: found no file of that name; expected /dev/stdin"));

    let piped = |give: &mut dyn FnMut(&mut dyn Write) -> std::io::Result<()>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
        command.args(["tune", "--preview", "--data", "/dev/stdin", "--model"]).arg(model());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        // A reader that has seen enough closes the pipe.
        while give(&mut input).is_ok() {}
        drop(input);
        child.wait_with_output().unwrap()
    };
    let mut rows = 1;
    let row = b"{\"prompt\":\"which is big ?\",\"completion\":\"dorb .\"}\n";
    let mut once = |input: &mut dyn Write| match std::mem::take(&mut rows) {
        0 => Err(std::io::ErrorKind::Other.into()),
        _ => input.write_all(row),
    };
    assert!(String::from_utf8(piped(&mut once).stdout).unwrap().contains("dorb"), "a pipe is read");
    // A line without an end, and blank lines without an end.
    let block = vec![b'x'; 1 << 20];
    let message = refused(&piped(&mut |input| input.write_all(&block)));
    assert!(message.contains("/dev/stdin:1: found a line of more than 536870912 bytes"), "{message}");
    let block = [&vec![b' '; 1 << 20][..], b"\n"].concat();
    let mut first = Some(&row[..]);
    let message = refused(&piped(&mut |input| input.write_all(first.take().unwrap_or(&block))));
    assert!(message.contains("more than 1073741824 bytes from a pipe; write them to a file"), "{message}");
}

/// Names that are neither paths nor names on the hub, and files of other kinds, are told as what they are.
#[test]
fn what_is_no_model_and_no_file_of_rows_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let plan = |model: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_swat")).args(["plan", "--offline", "--model", model]).output();
        refused(&output.unwrap())
    };
    let cache = write(dir.path(), "cache", "");
    for (model, told) in [
        ("gpt2", "gpt2: found no such path; expected a model directory, or a name on the hub"),
        ("qwen3:0.6b", "found no such path"),
        ("org/name:main", "or org/name@revision"),
        ("s3://bucket/model", "found an address; expected a path of this machine"),
        ("hf://org/name", "expected the name on the hub: org/name"),
        ("https://huggingface.co/org/name/tree/main", "expected the name on the hub: org/name"),
        (dir.path().to_str().unwrap(), "found no config.json"),
        (&cache, "malformed JSON"),
    ] {
        assert!(plan(model).contains(told), "{model}: {}", plan(model));
    }
    for (file, told) in [
        (
            "tiny.Q4_K_M.gguf",
            "found no config.json, but a GGUF file; expected the Hugging Face model that it was converted",
        ),
        ("consolidated.00.pth", "found no config.json, but weights in the format of their publisher"),
    ] {
        let folder = dir.path().join(file.replace('.', "_"));
        std::fs::create_dir(&folder).unwrap();
        let file = write(&folder, file, "GGUF");
        assert!(plan(folder.to_str().unwrap()).contains(told), "{}", plan(folder.to_str().unwrap()));
        assert!(plan(&file).contains(told.split_once("but ").unwrap().1), "{}", plan(&file));
    }
    // With the slash that completion adds, as without.
    assert!(
        plan("org/name/").starts_with("error: org/name: found a name that is not in the cache"),
        "{}",
        plan("org/name/")
    );

    let preview = |file: &str, more: &[&str]| refused(&swat("tune", &[&["--preview", "--data", file], more].concat()));
    assert!(preview("data/*.jsonl", &[]).contains("found a pattern"));
    // What a shell puts in the place of a pattern.
    let rows = "{\"prompt\":\"kelm\",\"completion\":\"dorb\"}\n";
    let (first, second) = (write(dir.path(), "1.jsonl", rows), write(dir.path(), "2.jsonl", rows.repeat(2)));
    assert_eq!(parsed(&swat("tune", &["--preview", "--data", &first, &second]))["data"]["examples"], 3);
    let packed = zstd::encode_all(&zstd::encode_all(rows.as_bytes(), 1).unwrap()[..], 1).unwrap();
    for (name, bytes, told) in [
        ("a.tar.gz", rows.as_bytes(), "found a tar archive"),
        ("b.xlsx", b"PK\x03\x04", "a workbook saved as CSV"),
        ("c.zst", packed.as_slice(), "found a file packed twice"),
        ("d.db", b"SQLite format 3\0", "found an SQLite database"),
        ("e.pkl", b"\x80\x04\x95rest", "found a pickled object"),
    ] {
        let message = preview(&write(dir.path(), name, bytes), &[]);
        assert!(message.contains(told), "{name}: {message}");
    }
    // Tables by columns: `Dataset.to_dict()`, and the forms of pandas' `to_json`.
    for (name, text) in [
        ("lists.json", r#"{"prompt": ["a", "b"], "completion": ["c", "d"]}"#),
        ("turns.json", r#"{"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}"#),
        ("columns.json", r#"{"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}"#),
        ("split.json", r#"{"columns": ["prompt", "completion"], "index": [0], "data": [["a", "c"]]}"#),
    ] {
        let message = preview(&write(dir.path(), name, text), &[]);
        assert!(message.contains(&format!("{name}:1: found a table by columns, [`")), "{message}");
        assert!(message.contains("expected one object a row"), "{message}");
    }
    let message = preview(&write(dir.path(), "f.json", r#"{"prompt": ["a", "b"], "completion": "c"}"#), &[]);
    assert!(message.contains("f.json:1: ") && !message.contains("by columns"), "{message}");
    let good = write(dir.path(), "good.jsonl", rows);
    let template = |name: &str| preview(&good, &["--chat-template", name]);
    assert!(template("chatml").contains("--chat-template chatml: found no such file"), "{}", template("chatml"));
    let config = model().join("tokenizer_config.json");
    assert!(template(config.to_str().unwrap()).contains("found a JSON object; expected the Jinja source alone"));
    let marked = write(dir.path(), "bom.jinja", "\u{feff}{{ messages }}");
    assert!(template(&marked).contains("found a byte-order mark"));
    let task = write(dir.path(), "task.jsonl", "{\"prompt\":\"kelm\",\"answer\":\"1\"}\n");
    assert!(refused(&swat("eval", &["--task", &task])).contains("expected how answers are compared: exact, number"));
}

/// Blank lines count: the place is the line of the file, not the number of the prompt.
#[test]
fn errors_of_later_stages_name_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let long = "kelm ".repeat(5000);
    let security =
        format!("{{\"prompt\":\"kelm\",\"label\":\"harmful\"}}\n\n\n{{\"prompt\":\"{long}\",\"label\":\"benign\"}}\n");
    let security = write(dir.path(), "s.jsonl", security);
    let message = refused(&swat("eval", &["--security", &security]));
    assert!(message.contains("s.jsonl:4: found a prompt of "), "{message}");
    let tasks = format!("\n{{\"prompt\":\"{long}\",\"answer\":\"1\",\"match\":\"number\"}}\n");
    let message = refused(&swat("eval", &["--task", &write(dir.path(), "task.jsonl", tasks)]));
    assert!(message.contains("task.jsonl:2: found a prompt of "), "{message}");
    let chat = write(dir.path(), "c.jsonl", format!("{{\"prompt\":\"kelm\"}}\n\n{{\"prompt\":\"{long}\"}}\n"));
    let message = refused(&swat("generate", &["--chat", &chat]));
    assert!(message.contains("c.jsonl:3: found a prompt of "), "{message}");
}

#[test]
fn measures_of_no_answer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let security = write(dir.path(), "s.jsonl", "{\"prompt\":\"kelm\",\"label\":\"harmful\",\"split\":\"test\"}\n");
    let eval = |more: &[&str]| swat("eval", &[&["--security", &security], more].concat());
    let task = write(dir.path(), "task.jsonl", "{\"prompt\":\"kelm\",\"answer\":\"1\",\"match\":\"number\"}\n");
    let range = |name: &str| format!("{name}: found 0; expected 1 to 1048576 tokens");
    assert!(refused(&eval(&["--answer-tokens", "0"])).contains(&range("answer_tokens")));
    assert!(refused(&swat("eval", &["--task", &task, "--task-tokens", "0"])).contains(&range("task_tokens")));
    assert!(refused(&eval(&["--splits", "ood"])).contains("no prompt of the splits ood"));
    assert!(refused(&swat("probe", &["--security", &security, "--answer-tokens", "0"])).contains("answer_tokens"));

    let found = parsed(&eval(&["--answer-tokens", "1", "--refusal-languages", "en,de"]));
    assert_eq!((&found["harmful_answers"]["cut_off"]["hits"], &found["asr"]["total"]), (&1.into(), &1.into()));
    assert!(found["asr_coherent"]["total"] == 1 && found["harmful_answers"]["empty"]["hits"] == 0, "{found}");
    let short = ["--data", &task, "--out", "unused", "--steps", "1", "--max-length", "1"];
    assert!(refused(&swat("tune", &short)).contains("max_length: found 1; expected at least 2 tokens"));
    let both = eval(&["--refusals", "x.txt", "--refusal-languages", "de"]);
    assert!(refused(&both).contains("cannot be used with"));
}
