//! Bounded reads of untrusted files.

use crate::error::{Error, FileOp, Result};
use std::fs::{self, File};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// The path of the file `name` in `dir`; `None` where there is none.
///
/// The name must not contain folders or `..`, and the target must be a regular file. A directory may come from an
/// archive that somebody else made, and files beside the weights are copied into outputs as they are: a link in it must
/// not bring a private file there. So a symbolic link may leave the directory only
/// - to a file of the same name, as where a model is linked file by file;
/// - into the `blobs` of the Hugging Face cache;
/// - as a `.safetensors` file, of which nothing but tensors of the expected names and shapes is taken.
///
/// # Errors
/// [`Error::Input`] for another name or target, or a link that leads nowhere; [`Error::Io`].
pub(crate) fn file_in(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    let place = dir.join(name).display().to_string();
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\\', '\0']) {
        let found = format!("the file name `{}`", name.escape_debug());
        return Err(Error::input(dir.display().to_string(), found, "the name of a file inside the model directory"));
    }
    let path = dir.join(name);
    let target = match (fs::canonicalize(&path), fs::read_link(&path)) {
        (Ok(target), _) => target,
        (Err(e), Ok(to)) if e.kind() == std::io::ErrorKind::NotFound => {
            let found = format!("a link to {}, where there is no file", to.display());
            return Err(Error::input(place, found, "the file, or a link to it: `cp -L` copies what links lead to"));
        }
        (Err(e), Err(_)) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        (Err(e), _) => return Err(Error::io(&path, FileOp::Read)(e)),
    };
    let root = fs::canonicalize(dir).map_err(Error::io(dir, FileOp::Read))?;
    let same_name = target.file_name().is_some_and(|file| file == name);
    if !(target.starts_with(&root) || same_name || in_hub_cache(&root, &target) || name.ends_with(".safetensors")) {
        let found = format!("a link to {}, outside the model directory and of another name", target.display());
        let expected = format!("the file itself: cp --remove-destination '{}' '{place}'", target.display());
        return Err(Error::input(place, found, expected));
    }
    if !fs::metadata(&target).map_err(Error::io(&path, FileOp::Read))?.is_file() {
        return Err(Error::input(place, "something that is not a regular file", "a file"));
    }
    Ok(Some(path))
}

/// Whether `target` lies in the `blobs` of a repository in the cache, or `root` is one of the same repository's
/// `snapshots`.
fn in_hub_cache(root: &Path, target: &Path) -> bool {
    let Some(blobs) = target.parent().filter(|p| p.ends_with("blobs")) else { return false };
    let repository = blobs.parent();
    let kind = repository.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let own = root.parent().filter(|p| p.ends_with("snapshots")).and_then(Path::parent);
    ["models--", "datasets--"].iter().any(|kinds| kind.starts_with(kinds)) || own.is_some() && own == repository
}

/// How a Git LFS pointer begins, which a clone without `git lfs` leaves in the place of a file.
pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs";
/// What to do about one.
pub(crate) const LFS_REMEDY: &str = "the file itself: run `git lfs pull`";

/// Opens what an option names: a file, or a pipe such as /dev/stdin or that of `<(command)`; a directory opens as well.
///
/// # Errors
/// [`Error::Input`] for a device, a terminal or a socket, which need have no end; [`Error::Io`].
pub(crate) fn open_stream(path: &Path) -> Result<File> {
    if path == Path::new("-") && !path.exists() {
        return Err(Error::input("-", "no file of that name", "/dev/stdin for the standard input"));
    }
    let kind = fs::metadata(path).map_err(Error::io(path, FileOp::Open))?.file_type();
    if let Some(found) = special(kind) {
        let expected = "a file, or a pipe: `command | swat … /dev/stdin`, or <(command)";
        return Err(Error::input(path.display().to_string(), found, expected));
    }
    File::open(path).map_err(Error::io(path, FileOp::Open))
}

/// Whether a path is a pipe, or the standard input, which processes that this one starts do not have.
pub(crate) fn is_pipe(path: &Path) -> bool {
    is_fifo(path) || ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"].iter().any(|name| path == Path::new(name))
}

#[cfg(unix)]
fn is_fifo(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_fifo(&found.file_type()))
}

#[cfg(not(unix))]
fn is_fifo(_: &Path) -> bool {
    false
}

/// Refuses a pipe among inputs, each with its option, that are read more than once.
///
/// # Errors
/// [`Error::Input`] names the option.
pub(crate) fn check_rereadable(inputs: &[(&str, &Path)]) -> Result<()> {
    let Some((option, path)) = inputs.iter().find(|(_, path)| is_fifo(path)) else { return Ok(()) };
    let found = format!("{}, a pipe, which can be read only once", path.display());
    Err(Error::input(*option, found, "a file"))
}

/// What is neither a file nor a pipe.
#[cfg(unix)]
fn special(kind: fs::FileType) -> Option<&'static str> {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        _ if kind.is_socket() => Some("a socket"),
        _ if kind.is_char_device() || kind.is_block_device() => Some("a device or a terminal"),
        _ => None,
    }
}

#[cfg(not(unix))]
fn special(_: fs::FileType) -> Option<&'static str> {
    None
}

/// Reads UTF-8 text of at most `max_bytes` from a file or a pipe.
///
/// # Errors
/// As [`open_stream`]; [`Error::Input`] for more bytes or another encoding.
pub(crate) fn read_stream(path: &Path, max_bytes: u64) -> Result<String> {
    text(path, read_at_most(open_stream(path)?, path, max_bytes)?)
}

/// Reads a regular file of at most `max_bytes`.
pub(crate) fn read_bytes(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(Error::io(path, FileOp::Read))?;
    if !metadata.is_file() {
        return Err(Error::input(path.display().to_string(), "something that is not a regular file", "a file"));
    }
    let bytes = read_at_most(File::open(path).map_err(Error::io(path, FileOp::Open))?, path, max_bytes)?;
    if bytes.starts_with(LFS_POINTER) {
        return Err(Error::input(path.display().to_string(), "a Git LFS pointer", LFS_REMEDY));
    }
    Ok(bytes)
}

fn read_at_most(file: File, path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(Error::io(path, FileOp::Read))?;
    if bytes.len() as u64 > max_bytes {
        let found = format!("more than {max_bytes} bytes");
        return Err(Error::input(path.display().to_string(), found, format!("at most {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// Reads a UTF-8 file of at most `max_bytes`.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    text(path, read_bytes(path, max_bytes)?)
}

fn text(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let found = format!("a byte that is not UTF-8 at offset {}", e.utf8_error().valid_up_to());
        Error::input(path.display().to_string(), found, "text in UTF-8")
    })
}

/// A parser's message on one line, with control characters escaped; it may quote its input.
pub(crate) fn printable(message: &impl ToString) -> String {
    message
        .to_string()
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_debug().collect() } else { vec![c] })
        .collect()
}

/// Runs a third-party parser on untrusted input; a panic becomes an error about `place`.
pub(crate) fn guarded<T>(place: &str, what: &str, run: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run))
        .map_err(|_| Error::input(place, format!("contents that make the {what} panic"), "a well-formed file"))
}
