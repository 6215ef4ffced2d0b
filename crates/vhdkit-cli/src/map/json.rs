//! The map as `qemu-img map --output=json` prints it, with the name of the layer's file added.

use std::io::{self, Write};

use serde_json::Value;
use vhdkit::image::{Extent, ExtentKind};

/// Writes extents one after another; nothing is held but the place.
#[derive(Debug)]
pub(crate) struct Writer<W: Write> {
    out: W,
    first: bool,
}

impl<W: Write> Writer<W> {
    /// An array of which nothing is written yet, so that an error at once leaves no beginning of one.
    pub(crate) fn new(out: W) -> Self {
        Self { out, first: true }
    }

    /// Adds an extent.
    pub(crate) fn extent(&mut self, extent: &Extent, layer: &str) -> io::Result<()> {
        let separator = if self.first { "[" } else { ",\n" };
        self.first = false;
        let (present, zero, offset) = match extent.kind {
            ExtentKind::Data { file_offset } => (true, false, file_offset),
            ExtentKind::Zero => (true, true, None),
            ExtentKind::Hole => (false, true, None),
        };
        let Extent { start, length, layer: depth, .. } = extent;
        write!(
            self.out,
            "{separator}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": false",
            data = !zero,
        )?;
        if let Some(offset) = offset {
            write!(self.out, ", \"offset\": {offset}")?;
        }
        write!(self.out, ", \"layer\": {}}}", Value::from(layer))
    }

    /// Ends the array.
    pub(crate) fn end(mut self) -> io::Result<()> {
        self.out.write_all(if self.first { b"[]\n" } else { b"]\n" })?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_is_that_of_qemu_img() {
        let extent = |start, kind, layer| Extent { start, length: 512, kind, layer };
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        writer.extent(&extent(0, ExtentKind::Data { file_offset: Some(4096) }, 0), "a\".vhdx").unwrap();
        writer.extent(&extent(512, ExtentKind::Data { file_offset: None }, 1), "b").unwrap();
        writer.extent(&extent(1024, ExtentKind::Zero, 0), "a").unwrap();
        writer.extent(&extent(1536, ExtentKind::Hole, 1), "b").unwrap();
        writer.end().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let first = "[{ \"start\": 0, \"length\": 512, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \
                     \"compressed\": false, \"offset\": 4096, \"layer\": \"a\\\".vhdx\"},\n";
        assert!(text.starts_with(first), "{text}");
        let parsed: Vec<Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed.len(), 4);
        assert_eq!(parsed[1].get("offset"), None);
        assert_eq!(
            (&parsed[2]["present"], &parsed[2]["zero"], &parsed[2]["data"]),
            (&true.into(), &true.into(), &false.into())
        );
        assert_eq!(
            (&parsed[3]["present"], &parsed[3]["zero"], &parsed[3]["depth"]),
            (&false.into(), &true.into(), &1.into())
        );
    }

    #[test]
    fn nothing_is_an_empty_array() {
        let mut bytes = Vec::new();
        Writer::new(&mut bytes).end().unwrap();
        assert_eq!(bytes, b"[]\n");
    }
}
