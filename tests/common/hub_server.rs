//! A hub on the loopback address, and the storage that it redirects to: status codes, headers and redirects as
//! huggingface.co gives them.

use serde_json::json;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// The commit of every repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Files of this size and larger lie in the storage.
const LARGE: usize = 100_000;

/// What the storage does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Sends so many bytes, and closes the connection.
    Break(usize),
    /// Answers with this status.
    Status(u16),
    /// Sends all from the first byte, whatever part is asked for.
    IgnoreRange,
}

/// Files by repository (`models/org/name`) and path.
type Repositories = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

#[derive(Default)]
struct State {
    repositories: Repositories,
    /// For the connections to the storage, in order.
    faults: Vec<Fault>,
    requests: Vec<Request>,
}

/// A request that came in.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Whether it came to the storage and not to the hub.
    pub storage: bool,
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
}

/// A running hub; it answers until the process ends.
pub struct HubServer {
    /// For `HF_ENDPOINT`.
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let storage = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let storage_url = format!("http://{}", storage.local_addr().unwrap());
        let endpoint = format!("http://{}", hub.local_addr().unwrap());
        listen(storage, state.clone(), from_storage);
        listen(hub, state.clone(), move |request, state| from_hub(request, state, &storage_url));
        Self { endpoint, state }
    }

    /// Adds a file to `models/org/name` or `datasets/org/name`.
    pub fn add(&self, repository: &str, path: &str, bytes: Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        state.repositories.entry(repository.to_owned()).or_default().insert(path.to_owned(), bytes);
    }

    /// What the storage does with the next connections.
    pub fn faults(&self, faults: &[Fault]) {
        self.state.lock().unwrap().faults = faults.to_vec();
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

/// An answer: status, headers, body, and the bytes of the body that are sent.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    sent: usize,
}

impl Answer {
    fn new(status: u16, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Self {
        let sent = body.len();
        Self { status, headers, body, sent }
    }

    fn error(status: u16, code: &str) -> Self {
        Self::new(status, vec![("X-Error-Code", code.into()), ("X-Error-Message", "no".into())], b"no".to_vec())
    }
}

fn listen(
    listener: TcpListener,
    state: Arc<Mutex<State>>,
    answer: impl Fn(&Request, &mut State) -> Answer + Send + Sync + 'static,
) {
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (state, answer) = (state.clone(), answer.clone());
            thread::spawn(move || {
                let _ = serve(stream, &state, &*answer);
            });
        }
    });
}

fn serve(
    mut stream: TcpStream,
    state: &Mutex<State>,
    answer: &dyn Fn(&Request, &mut State) -> Answer,
) -> std::io::Result<()> {
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    while !text.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => text.extend_from_slice(&buffer[..n]),
        }
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    let header = |name: &str| {
        let line = text.lines().find(|line| line.to_lowercase().starts_with(&format!("{name}:")))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let path = text.split(' ').nth(1).unwrap_or_default().to_owned();
    let request = Request { storage: false, path, authorization: header("authorization"), range: header("range") };
    let answer = answer(&request, &mut state.lock().unwrap());
    let mut head =
        format!("HTTP/1.1 {} X\r\ncontent-length: {}\r\nconnection: close\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    stream.write_all(&answer.body[..answer.sent])
}

fn etag(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

fn from_hub(request: &Request, state: &mut State, storage: &str) -> Answer {
    state.requests.push(request.clone());
    let path = request.path.as_str();
    if let Some(rest) = path.strip_prefix("/api/") {
        let Some((repository, revision)) = rest.split_once("/revision/") else {
            return Answer::error(404, "RepoNotFound");
        };
        if repository.ends_with("/gated") && request.authorization.as_deref() != Some("Bearer of-members") {
            return Answer::error(401, "GatedRepo");
        }
        // A repository that has another name now.
        if let Some(name) = repository.strip_prefix("models/old/") {
            return Answer::new(307, vec![("Location", format!("/api/models/org/{name}/revision/{revision}"))], vec![]);
        }
        let Some(files) = state.repositories.get(repository) else { return Answer::error(401, "RepoNotFound") };
        if !["main", COMMIT, "refs%2Fpr%2F1"].contains(&revision) {
            return Answer::error(404, "RevisionNotFound");
        }
        let siblings: Vec<_> = files.keys().map(|file| json!({ "rfilename": file })).collect();
        let body = json!({ "id": repository, "sha": COMMIT, "private": false, "siblings": siblings }).to_string();
        return Answer::new(200, vec![("X-Repo-Commit", COMMIT.into())], body.into_bytes());
    }
    let Some((name, file)) = path.split_once(&format!("/resolve/{COMMIT}/")) else {
        return Answer::error(404, "EntryNotFound");
    };
    let name = name.trim_start_matches('/').replace("old/", "org/");
    let repository = if name.starts_with("datasets/") { name } else { format!("models/{name}") };
    let Some(bytes) = state.repositories.get(&repository).and_then(|files| files.get(file)) else {
        return Answer::error(404, "EntryNotFound");
    };
    let commit = ("X-Repo-Commit", COMMIT.to_owned());
    if bytes.len() < LARGE {
        return Answer::new(200, vec![commit, ("ETag", format!("W/\"{}\"", etag(bytes)))], bytes.clone());
    }
    let headers = vec![
        commit,
        ("X-Linked-Etag", format!("\"{}\"", etag(bytes))),
        ("X-Linked-Size", bytes.len().to_string()),
        ("Location", format!("{storage}/{repository}/{file}?X-Signature=1")),
    ];
    Answer::new(302, headers, b"Found. Redirecting".to_vec())
}

fn from_storage(request: &Request, state: &mut State) -> Answer {
    state.requests.push(Request { storage: true, ..request.clone() });
    let path = request.path.trim_start_matches('/').trim_end_matches("?X-Signature=1");
    let found = state
        .repositories
        .iter()
        .find_map(|(repository, files)| files.get(path.strip_prefix(repository)?.strip_prefix('/')?).cloned());
    let Some(bytes) = found else { return Answer::error(404, "EntryNotFound") };
    let fault = if state.faults.is_empty() { None } else { Some(state.faults.remove(0)) };
    if let Some(Fault::Status(status)) = fault {
        return Answer::error(status, "");
    }
    let range = request.range.as_ref().filter(|_| fault != Some(Fault::IgnoreRange));
    let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let other = ("ETag", "\"of-the-storage\"".to_owned());
    let mut answer = match from {
        Some(from) if from >= bytes.len() => {
            return Answer::new(416, vec![("Content-Range", format!("bytes */{}", bytes.len()))], vec![]);
        }
        Some(from) => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            Answer::new(206, vec![other, ("Content-Range", range)], bytes[from..].to_vec())
        }
        None => Answer::new(200, vec![other], bytes),
    };
    if let Some(Fault::Break(sent)) = fault {
        answer.sent = sent.min(answer.sent);
    }
    answer
}
