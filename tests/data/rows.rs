//! Rows of data files: forms, places, limits and errors.

use std::io::{Cursor, Write};
use swat::data::{MAX_ROW_BYTES, Row, RowOptions, RowReader};
use swat::error::Result;

fn read_with(options: &RowOptions, name: &str, bytes: &[u8]) -> (Result<Vec<Row>>, RowReader) {
    let mut reader = RowReader::new(options);
    let rows = reader.read_from(Cursor::new(bytes.to_vec()), name, |row| Ok(row.clone()));
    (rows, reader)
}

fn rows_of(name: &str, bytes: &[u8]) -> Result<Vec<Row>> {
    read_with(&RowOptions::default(), name, bytes).0
}

fn rows(bytes: &[u8]) -> Result<Vec<Row>> {
    rows_of("train.jsonl", bytes)
}

fn error(bytes: &[u8]) -> String {
    rows(bytes).unwrap_err().to_string()
}

fn places(rows: &[Row]) -> Vec<&str> {
    rows.iter().map(|row| row.place.as_str()).collect()
}

fn columns(text: &str) -> RowOptions {
    RowOptions { columns: text.split(',').map(|c| c.parse().unwrap()).collect(), ..RowOptions::default() }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

#[test]
fn lines_are_numbered_as_in_the_file_and_blank_ones_skipped() {
    let read = rows(b"\xef\xbb\xbf\n{\"a\":1}\r\n  \n\n{\"b\":\"\xc3\xa9\"}").unwrap();
    assert_eq!(places(&read), ["train.jsonl:2", "train.jsonl:5"]);
    assert_eq!(read[1].text("b").unwrap(), "é");
    // A file made of two with byte-order marks.
    let read = rows(b"\xef\xbb\xbf{\"a\":1}\n\xef\xbb\xbf{\"a\":2}\n").unwrap();
    assert_eq!(places(&read), ["train.jsonl:1", "train.jsonl:2"]);
}

#[test]
fn errors_name_line_and_reason() {
    assert!(error(b"").starts_with("train.jsonl: found no line with an object"));
    assert!(error(b"\n \n").starts_with("train.jsonl: found no line with an object"));
    assert!(error(b"{}\n{\"a\": }").starts_with("train.jsonl:2: found invalid JSON at column 7 (expected value)"));
    assert!(error(b"{}\n\n{\"a\":\"\xff\"}").starts_with("train.jsonl:3: found bytes that are not UTF-8 (byte 7"));
    assert!(error(b"{\"a\":1}{\"a\":1}").contains("trailing characters"));
    assert!(error(b"{\n  \"data\": [{\"a\": 1}]\n}").contains("--field KEY"));
    assert!(error(b"{}\n[]").starts_with("train.jsonl:2: found a list in place of an object"));
}

#[test]
fn an_error_about_a_value_does_not_quote_it() {
    let message = error(b"\"secret words\"");
    assert!(message.contains("not an object") && !message.contains("secret"), "{message}");
}

#[test]
fn a_key_may_be_repeated_only_with_the_same_value() {
    assert_eq!(rows(b"{\"a\":[1],\"a\":[1]}").unwrap()[0].fields.len(), 1);
    assert!(error(b"{\"a\":1,\"a\":2}").contains("the key `a` twice"));
}

#[test]
fn a_row_may_be_as_long_as_the_limit_and_no_longer() {
    let line = |bytes: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(bytes - 8)).into_bytes();
    assert_eq!(rows(&[line(MAX_ROW_BYTES), b"\n".to_vec()].concat()).unwrap().len(), 1);
    assert_eq!(rows(&line(MAX_ROW_BYTES)).unwrap().len(), 1);
    let long = line(MAX_ROW_BYTES + 1);
    assert!(error(&long).contains("a line of more than"));
    let skip = RowOptions { skip_bad_rows: true, ..RowOptions::default() };
    let (read, reader) = read_with(&skip, "t.jsonl", &[&long, b"\n{}\n".as_slice()].concat());
    assert_eq!((places(&read.unwrap()), reader.skipped_rows()), (vec!["t.jsonl:2"], 1));

    let list = [b"[", long.as_slice(), b"]"].concat();
    assert!(rows(&list).unwrap_err().to_string().contains("a value of more than"));
    let cell = format!("a,b\n1,2\n\"{}\n", "x".repeat(2 * MAX_ROW_BYTES));
    let message = rows_of("t.csv", cell.as_bytes()).unwrap_err().to_string();
    assert!(message.starts_with("t.csv:3: found a row of more than"), "{message}");
}

#[test]
fn deep_nesting_is_an_error() {
    let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
    assert!(error(deep.as_bytes()).contains("recursion limit"));
    assert!(rows(format!("[{deep}").as_bytes()).unwrap_err().to_string().contains("cuts off"));
}

/// Python's `json.dumps` writes NaN and infinities; a data set is no worse for one in a key that nothing reads.
#[test]
fn numbers_that_json_lacks_are_null() {
    let read =
        rows(br#"{"id": NaN, "s": "NaN \" -Infinity", "x": [-Infinity, Infinity, 1e999], "y": -2.5e-3}"#).unwrap();
    assert_eq!(read[0].get("id"), None);
    assert_eq!(read[0].text("s").unwrap(), "NaN \" -Infinity");
    assert_eq!(read[0].fields["x"], serde_json::json!([null, null, null]));
    assert_eq!(read[0].fields["y"], -2.5e-3);
    assert!(read[0].text("id").unwrap_err().to_string().contains("`id` is null"));
    for wrong in [r#"{"a": nan}"#, r#"{"a": NaNa}"#, r#"{"a": +Infinity}"#, r#"{"a": NaN"#] {
        assert!(error(wrong.as_bytes()).contains("invalid JSON"), "{wrong}");
    }
}

#[test]
fn lists_have_the_lines_of_their_rows() {
    let file = b"\xef\xbb\xbf\r\n[\r\n  {\"a\": \"]},{\\\"\"},\r\n\r\n  {\r\n    \"a\": 2\r\n  }\r\n]\r\n";
    let read = rows_of("t.json", file).unwrap();
    assert_eq!(places(&read), ["t.json:3", "t.json:5"]);
    assert_eq!(read[0].text("a").unwrap(), "]},{\"");
    let message = |bytes: &[u8]| rows_of("t.json", bytes).unwrap_err().to_string();
    assert!(message(b"[\n{\"a\": 1,\n \"b\" 2},\n{}]").starts_with("t.json:3: found invalid JSON at column 6"));
    assert!(message(b"[{}, {\"a\" 2}]").starts_with("t.json:1: found invalid JSON at column 11"));
    assert!(message(b"[]").contains("an empty list"));
    assert!(message(b"[{\"a\":1}").contains("the end of the file"));
    assert!(message(b"[{\"a\":1} {}]").contains("cuts off") || message(b"[{\"a\":1} {}]").contains("trailing"));
    assert!(message(b"[1, 2]").contains("a value that is not an object"));
    assert!(message(b"[{}, {\"a\":").contains("cuts off"));
    // A second list would be lost.
    let behind = message(b"[{\"a\": 1}]\n[{\"a\": 2}]\n");
    assert!(behind.contains("t.json:2: found more text behind the list (column 1); expected one list"), "{behind}");
}

/// As `load_dataset("json", field="data")`.
#[test]
fn a_field_holds_the_rows_of_an_object() {
    let field = |name: &str| RowOptions { field: Some(name.into()), ..RowOptions::default() };
    let file =
        b"{\"version\": {\"data\": [\"x\"]}, \"n\": [[1]],\n \"data\": [\n{\"a\": 1},\n{\"a\": 2}], \"more\": 1}";
    let (read, reader) = read_with(&field("data"), "t.json", file);
    assert_eq!(places(&read.unwrap()), ["t.json:3", "t.json:4"]);
    reader.check_used().unwrap();
    let message = |name: &str| read_with(&field(name), "t.json", file).0.unwrap_err().to_string();
    assert!(message("rows").contains("no key `rows`") && message("rows").contains("`version`, `n`, `data`, `more`"));
    assert!(message("version").contains("a list under `version`"));
    let second = [&file[..], b"\n{\"data\": [{}]}"].concat();
    let second = read_with(&field("data"), "t.json", &second).0.unwrap_err().to_string();
    assert!(second.contains("t.json:5: found more text behind the list"), "{second}");
    let open = read_with(&field("data"), "t.json", b"{\"data\": [{}], \"more\": {}").0.unwrap_err().to_string();
    assert!(open.contains("the end of the file cuts off"), "{open}");
    let (read, reader) = read_with(&field("data"), "t.json", b"[{}]");
    assert!(read.is_ok() && reader.check_used().unwrap_err().to_string().starts_with("--field"));
}

#[test]
fn tables_have_a_header_and_the_lines_of_their_rows() {
    let csv = b"\xef\xbb\xbf,prompt,completion\r\n0,\"a,\r\nb\",\"say \"\"x\"\"\"\r\n\r\n1,c,\r\n";
    let read = rows_of("t.CSV", csv).unwrap();
    assert_eq!(places(&read), ["t.CSV:2", "t.CSV:5"]);
    assert_eq!((read[0].text("prompt").unwrap(), read[0].text("completion").unwrap()), ("a,\r\nb", "say \"x\""));
    assert_eq!(read[1].get("completion"), None);
    assert_eq!(rows_of("t.tsv", b"a\tb\n1\tx,y\n").unwrap()[0].text("b").unwrap(), "x,y");

    let message = |bytes: &[u8]| rows_of("t.csv", bytes).unwrap_err().to_string();
    assert!(message(b"a,b\n1,2\n3\n").starts_with("t.csv:3: found 1 values; expected 2"));
    assert!(message(b"a,b\n1,\xff\n").starts_with("t.csv:2: found bytes that are not UTF-8 (byte 1 of column `b`)"));
    assert!(message(b"a,a\n1,2\n").starts_with("t.csv:1: found the column `a` twice"));
    assert!(message(b"a;b\n1;2\n").contains("a header of one column"));
    assert!(message(b"a,b\n").contains("no rows") && message(b"").contains("no rows"));
}

#[test]
fn packed_files_are_told_by_their_bytes() {
    let text = b"{\"a\":1}\n{\"a\":2}\n";
    for packed in [gzip(text), zstd::encode_all(&text[..], 3).unwrap()] {
        // Files of several members, as `cat` makes them, under any name.
        let twice = [packed.as_slice(), &packed].concat();
        assert_eq!(rows_of("t.jsonl", &twice).unwrap().len(), 4);
        let message = rows_of("t.jsonl.gz", &packed[..packed.len() - 3]).unwrap_err();
        assert!(message.to_string().starts_with("t.jsonl.gz: cannot read") && message.exit_code() == 2, "{message}");
    }
    assert_eq!(rows_of("t.csv.gz", &gzip(b"a,b\n1,2\n")).unwrap()[0].text("b").unwrap(), "2");
    for (bytes, what) in [
        (b"PK\x03\x04....".as_slice(), "a zip archive"),
        (b"BZh91AY&SY", "bzip2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"\xfd7zXZ\0\0", "xz"),
        (b"\xff\xfea\0", "UTF-16"),
    ] {
        assert!(error(bytes).contains(what), "{what}");
    }
    assert!(error(&gzip(b"PK\x03\x04....")).contains("a zip archive"));
}

/// A small file that unpacks to gigabytes ends early, without holding them.
#[test]
fn a_decompression_bomb_is_refused() {
    let line = format!("{{\"a\":\"{}\"}}\n", "x".repeat(1 << 20));
    let mut zst = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    for _ in 0..80 {
        zst.write_all(line.as_bytes()).unwrap();
        gz.write_all(line.as_bytes()).unwrap();
    }
    for packed in [zst.finish().unwrap(), gz.finish().unwrap()] {
        let mut seen = 0;
        let count = |_: &Row| {
            seen += 1;
            Ok(())
        };
        let read = RowReader::default().read_from(Cursor::new(packed), "bomb.jsonl", count);
        let message = read.unwrap_err().to_string();
        assert!(message.contains("unpacks to more than 256 times its size"), "{message}");
        assert!(seen <= 64, "{seen} rows of 1 MiB");
    }
}

#[test]
fn bad_rows_are_counted_and_the_first_listed() {
    let file = b"{\"a\":1}\n{\n{\"b\" 1}\n{}\n]\n[\n{\n{\n{\"a\":2}\n";
    let message = error(file);
    let lines: Vec<&str> = message.lines().collect();
    assert!(lines[0].starts_with("train.jsonl:2: found invalid JSON at column 1"), "{message}");
    assert_eq!(lines[1], "6 rows are bad (--skip-bad-rows leaves such rows out):");
    let listed: Vec<&str> = lines[2..6].iter().map(|line| line.trim().split(": ").next().unwrap()).collect();
    assert_eq!(listed, ["train.jsonl:3", "train.jsonl:5", "train.jsonl:6", "train.jsonl:7"]);
    assert_eq!(lines[6], "  and 1 more");

    let skip = RowOptions { skip_bad_rows: true, ..RowOptions::default() };
    let (read, reader) = read_with(&skip, "train.jsonl", file);
    assert_eq!(places(&read.unwrap()), ["train.jsonl:1", "train.jsonl:4", "train.jsonl:9"]);
    let [skipped] = reader.skipped() else { panic!() };
    assert_eq!((skipped.file.as_str(), skipped.rows, skipped.first.len()), ("train.jsonl", 6, 5));
    assert!(read_with(&skip, "t.jsonl", b"{\n").0.is_err(), "nothing would be left");
    // In a list too, as far as its brackets tell the rows apart.
    let (read, reader) = read_with(&skip, "t.json", b"[{},\n{\"a\" 1},\n7,\n{}]");
    assert_eq!((places(&read.unwrap()), reader.skipped_rows()), (vec!["t.json:1", "t.json:4"], 2));
}

#[test]
fn columns_are_read_under_their_keys() {
    let file = b"question,response,prompt\nQ,A,x\n";
    let (read, reader) = read_with(&columns("prompt=question,answer=response"), "t.csv", file);
    let row = &read.unwrap()[0];
    assert_eq!((row.text("prompt").unwrap(), row.text("answer").unwrap()), ("Q", "A"));
    assert_eq!(row.get("question"), None);
    reader.check_used().unwrap();
    // Two keys may change places.
    let (read, _) = read_with(&columns("prompt=response,response=prompt"), "t.csv", file);
    let row = &read.unwrap()[0];
    assert_eq!((row.text("prompt").unwrap(), row.text("response").unwrap()), ("A", "x"));

    let (read, reader) = read_with(&columns("prompt=qestion"), "t.csv", file);
    assert!(read.is_ok());
    assert!(reader.check_used().unwrap_err().to_string().contains("no column `qestion` in any file"));
    let (read, _) = read_with(&columns("prompt=question,prompt=response"), "t.csv", file);
    assert!(read.unwrap_err().to_string().contains("both `question` and `response`"));
    let (read, _) = read_with(&columns("prompt=question"), "t.csv", b"question,a\n,1\n");
    assert!(read.unwrap()[0].text("prompt").unwrap_err().to_string().contains("`prompt` (column `question`) is null"));
    for wrong in ["prompt", "=x", "prompt="] {
        assert!(wrong.parse::<swat::data::Column>().is_err(), "{wrong}");
    }
}
