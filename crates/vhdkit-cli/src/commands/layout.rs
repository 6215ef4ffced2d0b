//! The layout options, as the library takes them.

use vhdkit::ops::create::{BlockState, CreateOptions, NewDiskType, Preallocation};

use crate::args::{self, LayoutArgs};
use crate::failure::Failure;

/// What the layout options say about a new image without parent.
pub(crate) fn options(layout: &LayoutArgs, size: Option<u64>) -> Result<CreateOptions, Failure> {
    let default = CreateOptions::default();
    Ok(CreateOptions {
        size,
        disk_type: if layout.fixed { NewDiskType::Fixed } else { NewDiskType::Dynamic },
        block_size: narrow("--block-size", layout.block_size)?,
        logical_sector_size: narrow("--logical-sector-size", layout.logical_sector_size)?,
        physical_sector_size: narrow("--physical-sector-size", layout.physical_sector_size)?,
        log_size: layout.log_size.unwrap_or(default.log_size),
        disk_id: layout.disk_id,
        file_write_guid: layout.file_write_guid,
        data_write_guid: layout.data_write_guid,
        creator: layout.creator.clone().unwrap_or_else(|| default.creator.clone()),
        preallocation: match layout.preallocate {
            None | Some(args::Preallocate::None) => Preallocation::None,
            Some(args::Preallocate::Falloc) => Preallocation::Falloc,
            Some(args::Preallocate::Full) => Preallocation::Full,
        },
        block_state: match layout.block_state {
            None | Some(args::BlockState::NotPresent) => BlockState::NotPresent,
            Some(args::BlockState::Zero) => BlockState::Zero,
        },
        ..default
    })
}

/// Sizes that are far below 4 GiB when they are right.
fn narrow(option: &str, value: Option<u64>) -> Result<Option<u32>, Failure> {
    let narrowed = value.map(u32::try_from).transpose();
    narrowed.map_err(|_| Failure::usage(format!("{option} is far too large"), "see --help for what is allowed"))
}

/// The first layout option that was given, for where none makes sense.
pub(crate) fn first_given(layout: &LayoutArgs) -> Option<&'static str> {
    let given = [
        ("--fixed", layout.fixed),
        ("--block-size", layout.block_size.is_some()),
        ("--logical-sector-size", layout.logical_sector_size.is_some()),
        ("--physical-sector-size", layout.physical_sector_size.is_some()),
        ("--log-size", layout.log_size.is_some()),
        ("--preallocate", layout.preallocate.is_some()),
        ("--block-state", layout.block_state.is_some()),
        ("--disk-id", layout.disk_id.is_some()),
        ("--creator", layout.creator.is_some()),
        ("--file-write-guid", layout.file_write_guid.is_some()),
        ("--data-write-guid", layout.data_write_guid.is_some()),
    ];
    given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
}

/// What a raw disk is padded to when it becomes an image of this layout.
pub(crate) fn raw_sector(layout: &LayoutArgs) -> u32 {
    if layout.logical_sector_size == Some(4096) { 4096 } else { 512 }
}
