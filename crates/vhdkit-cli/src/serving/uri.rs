//! URIs of exports, as the NBD project defines them (`doc/uri.md` there).

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

/// Where a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A Unix socket with an absolute path.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
    /// A socket without a path, which no URI can name.
    Unnamed,
}

impl Place {
    /// The URI of an export; nothing for what has none.
    pub(crate) fn uri(&self, name: &str, tls: bool) -> Option<String> {
        let scheme = if tls { "nbds" } else { "nbd" };
        let name = encode(name.as_bytes());
        match self {
            Self::Unix(path) => {
                let path = encode(path.as_os_str().as_bytes());
                Some(format!("{scheme}+unix:///{name}?socket={path}"))
            }
            Self::Tcp(address) => {
                let address = address.to_string().replace('%', "%25"); // before the zone of an IPv6 address
                Some(format!("{scheme}://{address}/{name}"))
            }
            Self::Unnamed => None,
        }
    }
}

/// Percent-encodes everything that could mean something in a URI. Slashes stay: names and paths may have them.
fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(char::from(*byte)),
            _ => {
                let _ = write!(out, "%{byte:02X}"); // writing to a String cannot fail
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_encoded() {
        let unix = Place::Unix(PathBuf::from("/tmp/a b/\u{e9}?#&.sock"));
        assert_eq!(
            unix.uri("my disk%.vhdx", false).unwrap(),
            "nbd+unix:///my%20disk%25.vhdx?socket=/tmp/a%20b/%C3%A9%3F%23%26.sock"
        );
        assert_eq!(unix.uri("", true).unwrap(), "nbds+unix:///?socket=/tmp/a%20b/%C3%A9%3F%23%26.sock");
        let tcp = |text: &str| Place::Tcp(text.parse().unwrap());
        assert_eq!(tcp("127.0.0.1:10809").uri("a/layer/0", false).unwrap(), "nbd://127.0.0.1:10809/a/layer/0");
        assert_eq!(tcp("[::1]:7").uri("a", true).unwrap(), "nbds://[::1]:7/a");
        assert_eq!(tcp("[fe80::1%2]:7").uri("a", false).unwrap(), "nbd://[fe80::1%252]:7/a");
        assert_eq!(Place::Unnamed.uri("a", false), None);
    }
}
