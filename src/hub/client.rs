//! Requests to the hub: what a revision holds, and downloads that continue where they broke.

use super::HubName;
use super::cache::Repository;
use super::names::is_part;
use crate::error::{Error, FileOp, Result};
use crate::progress::{Observer, Progress};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

const MAX_INFO_BYTES: u64 = 1 << 26;
const MAX_REDIRECTS: usize = 10;
/// Failures in a row, without a byte in between, after which the hub counts as unreachable.
const ATTEMPTS: u32 = 5;
/// Connections that one file may take.
const MAX_CONNECTIONS: u32 = 1000;
const FIRST_WAIT: Duration = Duration::from_millis(250);
const CONNECT: Duration = Duration::from_secs(10);
const RESPONSE: Duration = Duration::from_secs(30);
/// Longest silence within a download.
const SILENCE: Duration = Duration::from_secs(30);
/// Largest file whose size is not announced.
const MAX_UNANNOUNCED: u64 = 1 << 28;
const PIECE: usize = 1 << 16;

/// Why something could not be had from the hub.
#[derive(Debug)]
pub(super) enum Fault {
    /// Status 401 or 403.
    Refused(u16),
    NoRepository,
    NoRevision,
    NoFile(String),
    /// No connection, or no answer, or none but failures.
    Unreachable(String),
    /// An answer that the hub does not give.
    Malformed(String),
    /// The cache cannot be written.
    Disk(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

/// A revision of a repository.
pub(super) struct Info {
    /// The commit.
    pub(super) commit: String,
    /// Paths of its files.
    pub(super) files: Vec<String>,
}

pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// A file whose content begins to arrive.
struct Opened {
    etag: String,
    /// Size of the whole file, if announced.
    size: Option<u64>,
    /// Position of the first byte that arrives.
    from: u64,
    response: Response<Body>,
}

impl Client {
    pub(super) fn new(endpoint: &str, token: Option<String>) -> Result<Self> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let valid = endpoint.parse::<Uri>().is_ok_and(|uri| uri.scheme().is_some() && uri.host().is_some());
        if !valid || !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(Error::input(
                "HF_ENDPOINT",
                format!("`{}`", endpoint.escape_debug()),
                "a URL such as https://huggingface.co",
            ));
        }
        // Redirects are followed here: the token must not go along, and the ETag is that of the first answer.
        let agent = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(RESPONSE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("swat/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Ok(Self { agent, endpoint, token })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The commit and the files of a name's revision.
    pub(super) fn info(&self, name: &HubName) -> Result<Info, Fault> {
        let api = format!("{}/api/{}/{}", self.endpoint, name.plural(), name.repo());
        let found = self.json(&format!("{api}/revision/{}", encoded(name.revision())))?;
        let malformed = || Fault::Malformed("something that is no description of a repository".into());
        let commit = found["sha"].as_str().filter(|sha| is_part(sha)).ok_or_else(malformed)?.to_owned();
        // Some mirrors list files at this address alone.
        let tree = match &found["siblings"] {
            serde_json::Value::Array(_) => serde_json::Value::Null,
            _ => self.json(&format!("{api}/tree/{commit}?recursive=true"))?,
        };
        let files = found["siblings"].as_array().or_else(|| tree.as_array()).ok_or_else(malformed)?;
        let names = files.iter().filter_map(|file| file["rfilename"].as_str().or_else(|| file["path"].as_str()));
        // A path that leaves the snapshot is no file of it.
        let safe = |path: &&str| path.len() < 1024 && path.split('/').all(is_safe);
        Ok(Info { commit, files: names.filter(safe).map(str::to_owned).collect() })
    }

    /// The JSON at an address of the interface.
    fn json(&self, url: &str) -> Result<serde_json::Value, Fault> {
        self.patiently(&mut |_| {
            let mut response = checked(self.follow(url, None)?.0, None)?;
            let read = response.body_mut().with_config().limit(MAX_INFO_BYTES).read_to_string();
            let text = read.map_err(|e| Fault::Unreachable(e.to_string()))?;
            serde_json::from_str(&text).map_err(|_| Fault::Malformed("something that is no JSON".into()))
        })
    }

    /// Downloads a file of a commit into the cache.
    pub(super) fn download(
        &self,
        name: &HubName,
        repository: &Repository,
        commit: &str,
        file: &str,
        observer: Observer<'_>,
    ) -> Result<(), Fault> {
        let path: Vec<String> = file.split('/').map(encoded).collect();
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, name.page(), path.join("/"));
        let mut locked = None;
        self.patiently(&mut |progressed| {
            let opened = self.open(&url, file, &|etag| {
                // What another process has begun belongs to it until it is done.
                let there = fs::metadata(repository.incomplete(etag)).map_or(0, |partial| partial.len());
                Ok(if repository.blob(etag).exists() { None } else { Some(there) })
            })?;
            let Some(opened) = opened.1 else { return Ok(repository.link(commit, file, &opened.0)?) };
            if locked.as_ref().is_none_or(|(etag, _)| *etag != opened.etag) {
                let lock = repository.lock(&opened.etag)?;
                // While this waited, the holder may have finished, or gone on with what was there.
                let there = fs::metadata(repository.incomplete(&opened.etag)).map_or(0, |partial| partial.len());
                if repository.blob(&opened.etag).exists() {
                    return Ok(repository.link(commit, file, &opened.etag)?);
                }
                let stale = there != opened.from && opened.from > 0;
                locked = Some((opened.etag.clone(), lock));
                if stale {
                    *progressed = true;
                    return Err(Fault::Unreachable("another process had gone on with the download".into()));
                }
            }
            let (etag, partial) = (opened.etag.clone(), repository.incomplete(&opened.etag));
            receive(opened, &partial, file, observer, progressed)?;
            let blob = repository.blob(&etag);
            fs::rename(&partial, &blob).map_err(Error::io(&blob, FileOp::Rename))?;
            Ok(repository.link(commit, file, &etag)?)
        })
    }

    /// Asks for a file, from where `there` says that its content (by its ETag) is to continue; `None` there means that
    /// the content need not be sent.
    fn open(
        &self,
        url: &str,
        file: &str,
        there: &dyn Fn(&str) -> Result<Option<u64>, Fault>,
    ) -> Result<(String, Option<Opened>), Fault> {
        let mut from = 0;
        // Once for the ETag, and where the content follows at once, again for the rest of it.
        for _ in 0..2 {
            let (response, first) = self.follow(url, Some((from, there)))?;
            let Some(first) = first else {
                let response = checked(response, Some(file))?;
                let etag = etag(response.headers()).ok_or_else(|| Fault::Malformed("a file without an ETag".into()))?;
                let Some(have) = there(&etag)? else { return Ok((etag, None)) };
                if have > 0 && from == 0 {
                    from = have;
                    continue;
                }
                let opened = started(response, etag.clone(), None)?;
                return Ok((etag, Some(opened)));
            };
            if !first.wanted {
                return Ok((first.etag, None));
            }
            let response = checked(response, Some(file))?;
            let opened = started(response, first.etag.clone(), first.size)?;
            return Ok((first.etag, Some(opened)));
        }
        Err(Fault::Malformed("another ETag each time".into()))
    }

    /// Follows redirects to an answer. For a file, the first redirect that names an ETag says which content it is, and
    /// requests behind it ask for what `there` lacks.
    fn follow(&self, url: &str, file: Option<(u64, &There<'_>)>) -> Result<(Response<Body>, Option<First>), Fault> {
        let mut url = url.to_owned();
        let mut from = file.map_or(0, |(from, _)| from);
        let mut first: Option<First> = None;
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.agent.get(&url).header("accept-encoding", "identity");
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| Fault::Unreachable(e.to_string()))?;
            if !response.status().is_redirection() {
                return Ok((response, first));
            }
            let location = header(response.headers(), "location");
            let location = location.ok_or_else(|| Fault::Malformed("a redirect without a location".into()))?;
            if let (Some((_, there)), None, Some(etag)) = (file, &first, linked_etag(&response)) {
                let size = header(response.headers(), "x-linked-size").and_then(|size| size.parse().ok());
                let have = there(&etag)?;
                first = Some(First { etag, size, wanted: have.is_some() });
                let Some(have) = have else { return Ok((response, first)) };
                from = if size.is_some_and(|size| have > size) { 0 } else { have };
            }
            url = joined(&url, &location).ok_or_else(|| Fault::Malformed("a redirect to no address".into()))?;
        }
        Err(Fault::Malformed(format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// Repeats what a network may break. `step` sets its argument where it got further.
    fn patiently<T>(&self, step: &mut dyn FnMut(&mut bool) -> Result<T, Fault>) -> Result<T, Fault> {
        let mut failures = 0;
        for _ in 0..MAX_CONNECTIONS {
            let mut progressed = false;
            match step(&mut progressed) {
                Err(Fault::Unreachable(why)) => {
                    failures = if progressed { 1 } else { failures + 1 };
                    if failures >= ATTEMPTS {
                        return Err(Fault::Unreachable(format!("{why} (tried {ATTEMPTS} times)")));
                    }
                    std::thread::sleep(FIRST_WAIT * 2u32.pow(failures - 1));
                }
                other => return other,
            }
        }
        Err(Fault::Unreachable(format!("the connection broke {MAX_CONNECTIONS} times")))
    }
}

/// How many bytes of a content there are; `None` = all.
type There<'a> = dyn Fn(&str) -> Result<Option<u64>, Fault> + 'a;

/// What the hub says of a file before it sends the client to where it lies.
struct First {
    etag: String,
    size: Option<u64>,
    wanted: bool,
}

/// An answer with a content, or what its status says.
fn checked(response: Response<Body>, file: Option<&str>) -> Result<Response<Body>, Fault> {
    let code = header(response.headers(), "x-error-code").unwrap_or_default();
    match (response.status().as_u16(), code.as_str(), file) {
        (200 | 206 | 416, ..) => Ok(response),
        (404, "RevisionNotFound", _) => Err(Fault::NoRevision),
        (404, _, Some(file)) => Err(Fault::NoFile(file.to_owned())),
        (404, ..) => Err(Fault::NoRepository),
        (status @ (401 | 403), ..) => Err(Fault::Refused(status)),
        (status, ..) if status == 408 || status == 429 || status >= 500 => {
            Err(Fault::Unreachable(format!("it answers with status {status}")))
        }
        (status, ..) => Err(Fault::Malformed(format!("status {status}"))),
    }
}

/// The position and size of the content that an answer begins.
fn started(response: Response<Body>, etag: String, size: Option<u64>) -> Result<Opened, Fault> {
    let number = |name: &str| header(response.headers(), name).and_then(|text| text.parse::<u64>().ok());
    let (from, total) = match response.status().as_u16() {
        206 => {
            let range = header(response.headers(), "content-range").unwrap_or_default();
            let parts = range.strip_prefix("bytes ").and_then(|range| range.split_once('/'));
            let from = parts.and_then(|(range, _)| range.split_once('-')?.0.parse().ok());
            let from = from.ok_or_else(|| Fault::Malformed("a part of a file of no known position".into()))?;
            (from, parts.and_then(|(_, total)| total.parse().ok()))
        }
        // Nothing is left to send.
        416 => {
            let range = header(response.headers(), "content-range").unwrap_or_default();
            (u64::MAX, range.strip_prefix("bytes */").and_then(|total| total.parse().ok()))
        }
        _ => (0, number("content-length")),
    };
    Ok(Opened { etag, size: size.or(total), from, response })
}

/// Writes a content to its file, behind what is there.
fn receive(
    mut opened: Opened,
    partial: &Path,
    file: &str,
    observer: Observer<'_>,
    progressed: &mut bool,
) -> Result<(), Fault> {
    let there = fs::metadata(partial).map_or(0, |found| found.len());
    if opened.from == u64::MAX && opened.size == Some(there) {
        return Ok(());
    }
    if opened.from > there {
        // A part that does not continue what is there, or a file that is longer than it should be.
        fs::remove_file(partial)
            .or_else(|e| if there == 0 { Ok(()) } else { Err(e) })
            .map_err(Error::io(partial, FileOp::Remove))?;
        return Err(Fault::Unreachable("the download could not be continued".into()));
    }
    let most = opened.size.unwrap_or(MAX_UNANNOUNCED);
    if let (Some(size), Some(Ok(free))) = (opened.size, partial.parent().map(fs4::available_space))
        && size.saturating_sub(opened.from) > free
    {
        let help = "free some disk space, or set HF_HUB_CACHE to a larger disk".into();
        let (planned_bytes, free_bytes) = (size.saturating_sub(opened.from), free);
        return Err(Fault::Disk(Error::Memory {
            what: format!("{file} in {}", partial.display()),
            planned_bytes,
            free_bytes,
            help,
        }));
    }
    let mut out = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(partial)
        .map_err(Error::io(partial, FileOp::Create))?;
    out.set_len(opened.from).map_err(Error::io(partial, FileOp::Write))?;
    std::io::Seek::seek(&mut out, std::io::SeekFrom::Start(opened.from)).map_err(Error::io(partial, FileOp::Write))?;
    let (task, mib) = (format!("download {file}, MiB"), |bytes: u64| bytes.div_ceil(1 << 20) as usize);
    let mut reader = opened.response.body_mut().as_reader();
    let (mut at, mut piece) = (opened.from, vec![0; PIECE]);
    loop {
        observer(Progress::new(&task, mib(at), mib(most.max(at))));
        let read = match reader.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(e) => return Err(Fault::Unreachable(e.to_string())),
        };
        at += read as u64;
        if at > most {
            return Err(Fault::Malformed(format!("more than the {most} bytes of `{file}` that it announced")));
        }
        out.write_all(&piece[..read]).map_err(Error::io(partial, FileOp::Write))?;
        *progressed = true;
    }
    match opened.size {
        Some(size) if at < size => Err(Fault::Unreachable(format!("the connection broke after {at} of {size} bytes"))),
        _ => Ok(out.sync_all().map_err(Error::io(partial, FileOp::Write))?),
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// The ETag of a content, which becomes the name of a file.
fn etag(headers: &HeaderMap) -> Option<String> {
    let text = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"))?;
    let text = text.trim().trim_start_matches("W/").trim_matches('"');
    is_part(text).then(|| text.to_owned())
}

/// The ETag that a redirect states for the content behind it. One to another name of the repository (301, 307, 308)
/// states none.
fn linked_etag(response: &Response<Body>) -> Option<String> {
    let linked = response.headers().contains_key("x-linked-etag") || response.status().as_u16() == 302;
    if linked { etag(response.headers()) } else { None }
}

/// A part of a path that may be a file's name here.
fn is_safe(part: &str) -> bool {
    !part.is_empty()
        && part != "."
        && part != ".."
        && !part.contains(['\\', '\0', ':'])
        && !part.chars().any(char::is_control)
}

/// Percent-encodes everything that may not be in a part of a path.
fn encoded(part: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    part.bytes().map(|byte| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String)> {
    let uri: Uri = url.parse().ok()?;
    Some((uri.scheme_str()?.to_owned(), uri.authority()?.as_str().to_owned()))
}

/// The address that a redirect from `url` leads to.
fn joined(url: &str, location: &str) -> Option<String> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return Some(location.to_owned());
    }
    let (scheme, authority) = origin(url)?;
    location.starts_with('/').then(|| match location.strip_prefix("//") {
        Some(rest) => format!("{scheme}://{rest}"),
        None => format!("{scheme}://{authority}{location}"),
    })
}
